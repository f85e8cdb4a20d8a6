def start_tracking(stage, folder, settings):
    import os

    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(project="tinyllava", name=stage, dir=str(folder), mode="offline",
                      config={k: str(v) for k, v in settings.items()})
