"""The published recipe under FSDP: parameters, gradients and moments are DTensors of one rank."""

import published_recipe
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


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
