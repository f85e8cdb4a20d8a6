"""How one model is spread over ranks: the choice, and what it cannot be combined with."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from llava.errors import UserError
from llava.model.parallel import group

OFFLOADS = ("none", "cpu", "nvme=FOLDER")


@dataclass(frozen=True)
class Parallel:
    """A checked choice.

    Attributes:
        tensor: ranks that each hold a part of every decoder layer; 1 splits nothing.
        offload: with ZeRO-Inference, where the partitions are kept: "none" (on the device), "cpu" or "nvme"; None
            without it.
        folder: of the partitions, with "nvme".
    """

    tensor: int = 1
    offload: str | None = None
    folder: Path | None = None

    @property
    def ranks(self) -> int:
        """Parts into which the decoder's matrices are cut."""
        return self.tensor if self.offload is None else group.size()


def parallel_of(tensor_parallel: int, zero: str | None, quantization: str | None) -> Parallel | None:
    """Check the choice before anything is read; None for a model that one process holds whole.

    Args:
        zero: None, "none", "cpu" or "nvme=FOLDER".

    Raises:
        UserError: the choice contradicts itself or the group that this process has joined.
    """
    if tensor_parallel < 1:
        raise UserError(f"tensor_parallel should be at least 1, got {tensor_parallel}.")
    if tensor_parallel == 1 and zero is None:
        return None
    if tensor_parallel > 1 and zero is not None:
        raise UserError(
            f"tensor_parallel {tensor_parallel} and zero {zero!r} both spread the decoder's weights; choose one."
        )
    if quantization is not None:
        chosen = f"tensor_parallel {tensor_parallel}" if zero is None else f"zero {zero!r}"
        raise UserError(
            f"Quantization {quantization!r} cannot be combined with {chosen}, because a quantised weight cannot be "
            "cut; leave one of them out."
        )
    if zero is None:
        if group.size() != tensor_parallel:
            raise UserError(
                f"tensor_parallel {tensor_parallel} needs a replica of {tensor_parallel} ranks, but this process is in "
                f"a group of {group.size()}; start one process per part."
            )
        return Parallel(tensor=tensor_parallel)
    offload, _, folder = zero.partition("=")
    if offload not in ("none", "cpu", "nvme") or (offload == "nvme") != bool(folder):
        raise UserError(f"zero should be {', '.join(OFFLOADS[:-1])} or {OFFLOADS[-1]}, got {zero!r}.")
    return Parallel(offload=offload, folder=Path(folder) if folder else None)


def check_heads(config: PretrainedConfig, tensor_parallel: int, name: str) -> None:
    """Raise UserError if the decoder's heads cannot be dealt to the ranks in equal numbers.

    Args:
        config: of the HF model.
        name: of the checkpoint.
    """
    text = config.get_text_config()
    counts = {"attention heads": text.num_attention_heads, "key/value heads": text.num_key_value_heads}
    for what, count in counts.items():
        if count % tensor_parallel:
            raise UserError(
                f"The decoder of {name} has {count} {what}, which {tensor_parallel} ranks cannot share equally; choose "
                f"a tensor_parallel that divides {count}."
            )
