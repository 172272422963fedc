"""Ask Qwen2.5-VL about a picture whose vision tokens were written as coded bytes and read again.

    python examples/into_qwen.py photo.jpg "What does the sign say?" --codec codecs/qwen.safetensors
    python examples/into_qwen.py photo.jpg "What does the sign say?" --check

picture → vision tower → tokens → bytes → tokens → language model → answer. --check feeds uncoded
tokens and compares the logits with those of the model's own pixel path: they are equal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout

from common import arguments  # noqa: E402
from encoders.checkpoints import whole_checkpoint_folder  # noqa: E402
from encoders.image_sources import read_image_file  # noqa: E402
from encoders.towers import load_encoder  # noqa: E402
from heads.qwen_answer import ANSWER, IMAGE, PROMPT, embed_tokens  # noqa: E402
from lowrank_tokens import Codec  # noqa: E402
from lowrank_tokens.exceptions import InputError  # noqa: E402


def get_args_parser() -> arguments.Parser:
    """Return the parser of the command line."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("picture", help="image file")
    parser.add_argument("question", help="what to ask about it")
    model = "Qwen/Qwen2.5-VL-3B-Instruct"
    parser.add_argument("--model", default=model, help="folder or hub id of a checkpoint")
    parser.add_argument("--codec", metavar="FILE", help="codec fitted to this model's tokens")
    parser.add_argument("--error", type=arguments.fraction, default=0.16, help="raw_error, 0 to 1")
    parser.add_argument("--image_size", type=arguments.positive_int, default=448, help="pixels")
    parser.add_argument("--check", action="store_true", help="compare with the pixel path")
    return parser


@torch.no_grad()
def main(args) -> None:
    """Encode the picture, code its tokens, and let the language model answer."""
    if not (args.codec or args.check):
        raise InputError("--codec is missing: type one of experiments.fit_codec, or --check")
    picture, codec = read_image_file(args.picture), args.codec and Codec.load(args.codec)
    folder = whole_checkpoint_folder(args.model)
    tower = load_encoder(str(folder), device="cpu", image_size=args.image_size)
    pixels = tower.preprocess(picture)
    tokens, grid = tower.encode(pixels[None])[0].float(), tower.grid_of(pixels)  # [T, D]
    if codec:
        if other := codec.other_encoder({"weights_sha256": tower.weights_sha256}):
            raise InputError(f"--codec {args.codec} {other}: fit one to this model's tokens")
        data = codec.encode(tokens, grid, error=args.error)
        print(f"{2 * tokens.numel()} bytes of tokens (bf16) became {len(data)}")
        tokens = codec.decode(data)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    request = ANSWER.format(question=args.question)
    text = PROMPT.format(image=IMAGE * len(tokens), request=request)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]  # [1, L]
    inputs = embed_tokens(model, ids, [tokens], [grid])
    if args.check:
        merge = model.config.vision_config.spatial_merge_size
        thw = torch.tensor([[1, merge * grid[0], merge * grid[1]]])
        kinds = (ids == model.config.image_token_id).int()
        own = {"pixel_values": pixels.flatten(0, -2), "image_grid_thw": thw}
        wanted = model(input_ids=ids, mm_token_type_ids=kinds, **own).logits
        apart = (model(**inputs).logits - wanted).abs().max()
        print(f"largest difference of a logit to the pixel path: {apart:.3g}")
    new = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(f"answer: {tokenizer.decode(new[0], skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
