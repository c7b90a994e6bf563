"""transformers' own BitNet model as a subject: its layers, its files, a loop of one's own.

`BitNetForCausalLM` with `AutoBitLinear`, quantizing online; exported as `save_pretrained` does.
Data, schedule and loop are those of `foreign_language_model`, beside this file.
"""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from foreign_language_model import LENGTH, SPLITS, VOCABULARY, Loop, Words
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant

from forge_harness.formats.detect import open_checkpoint
from forge_harness.subject.protocols import ModelSpec, TrainOptions

# AutoBitLinear compiles its quantizers, 20 s at the first call: a model as small as this is faster
# without.
torch.compiler.set_stance("force_eager")

QUANTIZATION = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
}
FULL_PRECISION = ("model.embed_tokens", "lm_head")


def new_model(seed):
    config = BitNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = BitNetForCausalLM(config).float()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in FULL_PRECISION:
            layer = AutoBitLinear(
                module.in_features, module.out_features, bias=False, online_quant=True
            )
            layer.weight = module.weight
            model.set_submodule(name, layer)
    return model


NAMES = tuple(
    name for name, module in new_model(0).named_modules() if isinstance(module, AutoBitLinear)
)


class Session(Loop):
    def __init__(self, subject, options):
        super().__init__(subject, options)
        if options.precision == "full":
            for name in NAMES:
                layer = self.model.get_submodule(name)
                layer.forward = lambda x, layer=layer: F.linear(x, layer.weight)

    def evaluate(self):
        return self.subject.evaluate(self.model)

    def state_tensors(self):
        tensors = dict(self.model.state_dict())
        for index, kept in self.optimizer.state_dict()["state"].items():
            for name, value in kept.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        tensors["position"] = torch.tensor([self.step_index, self.place, *self.order])
        return tensors


class HuggingFace(Words):
    """Offers what it takes for architecture, data, training and the handovers."""

    name = "hugging-face"
    loop = Session

    def quantize_weight(self, weight):
        scale = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
        return (weight.float() * scale).round().clamp(-1, 1).to(torch.int8), 1.0 / scale

    def quantize_activation(self, x):
        scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (x.float() * scale).round().clamp(-128, 127).to(torch.int8), 1.0 / scale

    def linear(self, x, weight, bias=None):
        return F.linear(ActQuant.apply(x), WeightQuant.apply(weight), bias)

    def integer_linear(self, x, weight):
        (codes, scale), (q, beta) = self.quantize_weight(weight), self.quantize_activation(x)
        return q.int() @ codes.int().T, beta * scale

    def model_spec(self, task):
        model = new_model(0)
        return ModelSpec(
            task=task,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            max_parameters=100_000,
            quantized=NAMES,
            full_precision=FULL_PRECISION,
            sub_norms=tuple(n for n, _ in model.named_modules() if n.endswith("sub_norm")),
            tied=(("model.embed_tokens.weight", "lm_head.weight"),),
            causal=True,
        )

    def build_model(self, task, *, seed):
        return new_model(seed)

    def loss(self, model, batch):
        logits = model(batch.inputs).logits.flatten(0, -2)
        return F.cross_entropy(logits, batch.targets.flatten())

    def effective_weights(self, model):
        return {n: WeightQuant.apply(w.detach()) for n, w in self.latent_weights(model).items()}

    def groups(self, model):
        embedding = model.model.embed_tokens.weight
        decay = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
        rest = [p for p in model.parameters() if p.dim() < 2 or p is embedding]
        return [{"params": decay}, {"params": rest, "decays": 0.0}]

    def latent_weights(self, model):
        return {name: model.get_submodule(name).weight for name in NAMES}

    @torch.no_grad()
    def evaluate(self, model):
        was_training = model.training
        model.eval()
        batch = self.batch("words", "validation", range(len(SPLITS["validation"][1])))
        right = model(batch.inputs).logits.argmax(-1) == batch.targets
        found = {"loss": float(self.loss(model, batch)), "accuracy": float(right.float().mean())}
        model.train(was_training)
        return found

    def save_session(self, session, path):
        state = {
            "model": session.model.state_dict(),
            "optimizer": session.optimizer.state_dict(),
            "position": (session.step_index, session.place, list(session.order)),
        }
        beside = path.with_name(f"{path.name}.part")
        try:
            with beside.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def resume_session(self, task, options, path):
        session, state = self.session(task, options), torch.load(path, weights_only=True)
        session.model.load_state_dict(state["model"])
        session.optimizer.load_state_dict(state["optimizer"])
        session.step_index, session.place, session.order = state["position"]
        return session

    def export_package(self, session, path):
        session.model.save_pretrained(path)
        config = Path(path) / "config.json"
        stated = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(stated | {"quantization_config": QUANTIZATION}))

    def provide_checkpoint(self, directory):
        session = self.session("words", TrainOptions(steps=2))
        session.step()
        self.export_package(session, directory / "trained")
        return directory / "trained"

    def evaluate_package(self, task, path):
        model = new_model(0)
        with open_checkpoint(path) as checkpoint, torch.no_grad():
            ternary = checkpoint.ternary_names()
            for name, parameter in model.named_parameters():
                read = checkpoint.master if name in ternary else checkpoint.plain
                parameter.copy_(read(name))
        return self.evaluate(model)


subject = HuggingFace()
