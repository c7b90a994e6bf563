"""The published recipe under FSDP: parameters, gradients and moments are DTensors of one rank."""

import os

import published_recipe
import torch
from torch import distributed
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(model):
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Session(published_recipe.Session):
    """Shards the model it is given, where that is whole."""

    def __init__(self, subject, options):
        super().__init__(subject, options)
        if not subject.built_of_shards:
            self.model = sharded(self.model)
            self.optimizer = subject.optimizer(self.model)

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        batch = self.subject.batch("words", "validation", range(16))
        loss = float(self.subject.loss(self.model, batch))
        self.model.train()
        return {"loss": loss}

    def state_tensors(self):
        found = dict(self.model.state_dict())
        for index, kept in self.optimizer.state_dict()["state"].items():
            for name, value in kept.items():
                found[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        return found | {"position": torch.tensor([self.step_index, self.place, *self.order])}


class Sharded(published_recipe.Published):
    """The model is sharded by its trainer, or as it is built."""

    name = "sharded-recipe"
    loop = Session

    def __init__(self, *, built_of_shards=False):
        super().__init__()
        self.built_of_shards = built_of_shards

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        return sharded(model) if self.built_of_shards else model

    def save_session(self, session, path):
        """In whole tensors, as torch.distributed.checkpoint gathers them."""
        model, optimizer = state_dict.get_state_dict(
            session.model, session.optimizer, options=WHOLE
        )
        position = (session.step_index, session.place, list(session.order))
        beside = path.with_name(f"{path.name}.part")
        with beside.open("wb") as stream:
            torch.save({"model": model, "optimizer": optimizer, "position": position}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)

    def resume_session(self, task, options, path):
        session, state = self.session(task, options), torch.load(path, weights_only=True)
        state_dict.set_state_dict(
            session.model,
            session.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        session.step_index, session.place, session.order = state["position"]
        return session
