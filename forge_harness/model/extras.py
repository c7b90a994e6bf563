"""What a module does beyond the forward of its class, and what is made of its tensors would not."""

from __future__ import annotations

from torch import nn


def refuse_extras(module: nn.Module, own: type[nn.Module], name: str = "") -> None:
    """Raises unless `module` computes what `own.forward` does, and nothing around it.

    Args:
        module: Is about to be read, not called.
        own: The class whose forward is reproduced.
        name: Of the module, for the message.

    Raises:
        ValueError: It has another forward, by its class or set on itself, or forward hooks.
    """
    where = f"{name}: " if name else ""
    kind = type(module)
    if kind.forward is not own.forward or "forward" in vars(module):
        given = "was given" if kind.forward is own.forward else "has"
        raise ValueError(
            f"{where}{kind.__module__}.{kind.__name__} {given} a forward of its own; expected that "
            f"of {own.__module__}.{own.__name__}: its copy would not compute the rest, so put it "
            "into a module around this one."
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"{where}{kind.__name__} has forward hooks; expected none: its copy would not call "
            "them, so remove them, or put them on a module around this one."
        )
