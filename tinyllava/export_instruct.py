"""Write the model of all answer formats as a checkpoint of the transformers `llava` layout, with its CLIP text tower.

python -m tinyllava.export_instruct --folder runs/instruct --output assets/tinyllava_instruct
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

from tinyllava.export_next import generation_config, load_parts, read_arguments
from tinyllava.instruct_model import build_instruct, grown_table
from tinyllava.instruct_vocabulary import ids, tokenizer, words
from tinyllava.processor_config import write_processor_config
from tinyllava.vocabulary import EOS

TEXT_TABLE = "text_model.embeddings.token_embedding.weight"


def load_trained(folder: Path, model: str | Path) -> LlavaForConditionalGeneration:
    """The LLaVA that `tinyllava.train_instruct` left in `folder`, float32; tower from the embedded model.

    The last checkpoint of a training that is not finished will do.
    """
    trained = build_instruct(model)
    done = folder / "instruct.pt"
    if done.exists():
        masters = torch.load(done, weights_only=True)
    else:
        masters = torch.load(folder / "instruct.checkpoint.pt", weights_only=True)["optimizer"]["masters"]
    load_parts(trained, masters)
    return trained.eval()


def main() -> None:
    args = read_arguments(__doc__)
    trained = load_trained(args.folder, args.model)
    trained.generation_config = generation_config(ids()[EOS])
    trained.half().save_pretrained(args.output)
    write_processor_config(trained.config, args.output)
    tokenizer().save_pretrained(args.output)
    CLIPImageProcessorPil.from_pretrained(args.model).save_pretrained(args.output)
    write_text_tower(Path(args.model) / "text_tower", args.output / "text_tower")
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


def write_text_tower(source: Path, folder: Path) -> None:
    """The embedded model's text tower with rows for the new words: a like word's, or the mean of all. Not trained."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "model.safetensors")
    weights[TEXT_TABLE] = grown_table(weights[TEXT_TABLE].float(), 0.0, seed=0).half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"vocab_size": len(words()), "eos_token_id": ids()[EOS]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
