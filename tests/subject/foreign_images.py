"""Grey images that are no file of the reference, as data of a subject."""

import hashlib
import random

import torch

from forge_harness.protocols import Batch, DataInfo

CLASSES = 4
SIZES = {"train": 200, "validation": 50}


class Images:
    """Offers LoadsData: grey images, flipped at random in training."""

    flipped = 0.5

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = {
            split: torch.randint(256, (size, 8, 8), generator=generator) / 255
            for split, size in SIZES.items()
        }

    def tasks(self):
        return ("images",)

    def data_info(self, task):
        return DataInfo(
            kind="classes",
            cardinality=CLASSES,
            train_size=SIZES["train"],
            validation_size=SIZES["validation"],
            digest=self.data_digest(task),
            input_dtype="float32",
        )

    def data_digest(self, task):
        content = b"".join(self.documents(task, "train"))
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    def documents(self, task, split):
        return [image.numpy().tobytes() for image in self.images[split]]

    def sample_contents(self, task, split, ids):
        return [self.images[split][index].numpy().tobytes() for index in ids]

    def labels(self, task, split):
        return [index % CLASSES for index in range(SIZES[split])]

    def read(self, split, ids):
        return self.images[split][list(ids)]

    def batch(self, task, split, ids):
        images = self.read(split, ids)
        if split == "train":
            chosen = torch.rand(len(images)) < self.flipped
            images = torch.where(chosen[:, None, None], images.flip(-1), images)
        return Batch(inputs=images, targets=torch.tensor(list(ids)) % CLASSES)

    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        order = list(range(SIZES["train"]))
        random.Random(1000 * seed + epoch).shuffle(order)
        return order[rank::world_size]
