"""What every fused operation demands of its arguments, said before anything is launched."""

from torch import Tensor


def require(op: str, name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless ``tensor`` has the device and dtype of ``like`` and, where given, this shape."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}; move it there")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {like.dtype}; convert one of them")
    if shape is not None:
        require_shape(op, name, tensor, shape)


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
