"""transformers' Trainer as the trainer of a subject: it owns its loop.

Its optimizer, its schedule, its order of the data, its checkpoints and its evaluation; the model,
its files and the data are those of `hugging_face_subject`, beside this file.
"""

import math
import os
import shutil
import tarfile
import tempfile
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from hugging_face_subject import NAMES, HuggingFace
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from forge_harness.subject.loops import SteppedLoop
from forge_harness.subject.protocols import ScheduleSpec, ScheduleStep, StepRecord

WARMUP = 3


class Samples(Dataset):
    def __init__(self, subject, split, ids):
        self.subject, self.split, self.ids = subject, split, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, place):
        batch = self.subject.batch("words", self.split, [self.ids[place]])
        # The Trainer counts targets as if the loss left out the first of them.
        labels = F.pad(batch.targets[0], (1, 0), value=-100)
        return {"input_ids": batch.inputs[0], "labels": labels, "sample": self.ids[place]}


def loss_of_all(outputs, labels, num_items_in_batch=None):
    """The share of the mean over all targets of the optimizer step."""
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(outputs.logits.flatten(0, -2), targets, reduction="sum")
    return total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)


def accuracy(found):
    return {"accuracy": float((found.predictions == found.label_ids[:, 1:]).mean())}


class Recording(Trainer):
    """Keeps which samples a step took, and their loss."""

    def __init__(self, **given):
        super().__init__(**given)
        self.samples, self.loss = [], 0.0

    def get_decay_parameter_names(self, model):
        names = super().get_decay_parameter_names(model)
        return [name for name in names if "embed" not in name]

    def training_step(self, model, inputs, *given):
        self.samples += inputs.pop("sample").tolist()
        loss = super().training_step(model, inputs, *given)
        self.loss += float(loss)
        return loss

    def prediction_step(self, model, inputs, *given, **named):
        inputs.pop("sample")
        return super().prediction_step(model, inputs, *given, **named)


class Pausing(TrainerCallback):
    """Pauses before the first step and after each one.

    It refers to no session, which would otherwise live as long as its loop.
    """

    def __init__(self, trainer, pause):
        self.trainer, self.pause = trainer, pause

    def on_train_begin(self, args, state, control, **given):
        self.pause(None)
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, optimizer, **given):
        self.group = dict(optimizer.param_groups[0])
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            optimizer.zero_grad()

    def on_log(self, args, state, control, logs, **given):
        if "grad_norm" not in logs:
            return
        record = StepRecord(
            step=state.global_step - 1,
            loss=self.trainer.loss,
            learning_rate=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            grad_norm=logs["grad_norm"],
            sample_ids=tuple(self.trainer.samples),
            seconds=time.perf_counter() - self.began,
        )
        self.trainer.samples, self.trainer.loss = [], 0.0
        self.pause(record)
        self.began = time.perf_counter()


class Session:
    def __init__(self, subject, options, saved=None):
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder)
        checkpoint = None if saved is None else str(self.folder / "saved")
        if checkpoint is not None:
            with tarfile.open(saved) as archive:
                archive.extractall(checkpoint, filter="data")
        batch = len(options.fixed_batch or ()) or options.batch_size or 16
        size = subject.data_info("words").train_size
        self.trainer = Recording(
            model=subject.build_model("words", seed=options.seed),
            args=TrainingArguments(
                output_dir=str(self.folder),
                max_steps=options.steps,
                per_device_train_batch_size=batch // options.accumulation,
                per_device_eval_batch_size=16,
                gradient_accumulation_steps=options.accumulation,
                learning_rate=options.learning_rate or 3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=min(WARMUP, options.steps - 1),
                weight_decay=0.1,
                max_grad_norm=options.clip_norm or 1.0,
                seed=options.seed,
                data_seed=options.seed,
                train_sampling_strategy="sequential" if options.fixed_batch else "random",
                remove_unused_columns=False,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                save_total_limit=1,
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=Samples(subject, "train", options.fixed_batch or range(size)),
            eval_dataset=Samples(
                subject, "validation", range(subject.data_info("words").validation_size)
            ),
            compute_loss_func=loss_of_all,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        self.trainer.remove_callback(PrinterCallback)
        self.model = self.trainer.model
        if options.precision == "full":
            for name in NAMES:
                layer = self.model.get_submodule(name)
                layer.forward = lambda x, layer=layer: F.linear(x, layer.weight)
        trainer = self.trainer  # not the session, which could then not be collected

        def run(pause):
            trainer.add_callback(Pausing(trainer, pause))
            trainer.train(resume_from_checkpoint=checkpoint)

        self.loop = SteppedLoop(run)
        self.loop.advance()
        self.optimizer = trainer.optimizer

    @property
    def step_index(self):
        return self.trainer.state.global_step

    def step(self):
        return self.loop.advance()

    def evaluate(self):
        found = self.trainer.evaluate()
        return {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}

    def checkpoint(self):
        # What `control.should_save` has the Trainer call, which only takes effect after a step.
        self.trainer._save_checkpoint(self.model, None)
        return self.folder / f"checkpoint-{self.step_index}"

    def state_tensors(self):
        tensors = dict(self.model.state_dict())
        for index, kept in self.optimizer.state_dict()["state"].items():
            for name, value in kept.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        tensors["step"] = torch.tensor(self.step_index)
        return tensors


class Driven(HuggingFace):
    name = "hugging-face-trainer"
    loop = Session

    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        sampler = SeedableRandomSampler(range(self.data_info(task).train_size), data_seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)[rank::world_size]

    def schedule_spec(self, task, options):
        return ScheduleSpec(
            kind="transformers-cosine",
            peak=options.learning_rate or 3e-3,
            warmup_steps=min(WARMUP, options.steps - 1),
            total_steps=options.steps,
            weight_decay=0.1,
        )

    def planned_schedule(self, task, options):
        spec, shares = self.schedule_spec(task, options), []
        for step in range(options.steps):
            done = (step - spec.warmup_steps) / max(1, options.steps - spec.warmup_steps)
            warm = step / max(1, spec.warmup_steps)
            shares.append(warm if done < 0 else (1 + math.cos(math.pi * done)) / 2)
        return [ScheduleStep(learning_rate=spec.peak * s, weight_decay=0.1) for s in shares]

    def save_session(self, session, path):
        beside = path.with_name(f"{path.name}.part")
        try:
            with beside.open("wb") as stream:
                with tarfile.open(fileobj=stream, mode="w") as archive:
                    archive.add(session.checkpoint(), ".")
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def resume_session(self, task, options, path):
        return self.loop(self, options, path)


subject = Driven()
