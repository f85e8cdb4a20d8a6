"""What scripts written for LLaVA's own package call before they load a model."""


def disable_torch_init() -> None:
    """Do nothing: LLaVA switches torch's random initialisation off here, and a checkpoint is loaded without any."""
