"""Qwen2.5-VL's language model as a head: question and answer of a row, read with given tokens.

    head = QwenAnswerHead(dataset, device="cuda", name="Qwen/Qwen2.5-VL-3B-Instruct")
    logits = head.outputs(tokens, rows)             # next-token logits at the answer's positions
    answers = head.generate(tokens, rows)           # greedy

`embed_tokens` puts vision tokens in the place of an image. Beside the encoders' modules this is the
only one that imports transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from encoders.checkpoints import (
    checkpoint_weights_sha256,
    tower_of_checkpoint,
    whole_checkpoint_folder,
)
from heads.task_head import Score, TaskHead
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Box, Grid, box_in_view
from qwenvl_dataloader import RealQwenVLDataset

# Qwen2.5-VL's chat template for one image and one request, written out
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>{request}<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER = "{question}\nAnswer the question using a single word or phrase."
# answered by [{"bbox_2d": [x1, y1, x2, y2], "label": …}], pixels of the image as the tower saw it
LOCATE = (
    "Locate the text in the image that answers this question: {question}\nOutput its bbox "
    "coordinates in JSON format."
)
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(r"bbox_2d\W*\[" + ",".join([NUMBER] * 4) + r"\]")
IMAGE, END = "<|image_pad|>", "<|im_end|>"


class QwenAnswerHead(TaskHead):
    """Next-token logits [b, L, V] float32 of the row's answer and its end, teacher-forced.

    L is the longest answer of the batch; positions after a shorter one hold zeros. sha256 is over
    all weight files of the checkpoint. Raises InputError for tokens of another vision tower, and
    where a row of the cache lacks question or answer.
    """

    name = "qwen-answer"
    output = "answer logits"
    loss_name = "KL divergence of the answer's tokens, nats"

    def __init__(
        self, dataset: RealQwenVLDataset, device: torch.device | str, name: str | None = None
    ) -> None:
        folder = _folder_of(dataset, name)
        self.sha256 = checkpoint_weights_sha256(folder)
        self.tokenizer = _read(AutoTokenizer, folder)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        model = _read(Qwen2_5_VLForConditionalGeneration, folder, dtype=dtype)
        _check_rows(dataset)
        del model.model.visual  # its outputs are given
        self.model = model.to(device).eval().requires_grad_(False)
        self.dataset, self.device = dataset, torch.device(device)
        self.merge = model.config.vision_config.spatial_merge_size  # patches a token, along a side
        self.pixels = self.merge * model.config.vision_config.patch_size  # likewise

    def outputs(self, tokens: Tensor, rows: Tensor) -> Tensor:
        found = []
        for image, row in zip(tokens, rows.split(1), strict=True):
            prompt, wanted = self._ids(self.prompt(int(row))), self._wanted(int(row))
            # the logits at one position are those of the next token
            ids = torch.cat([prompt, wanted[:-1]])[None]
            inputs = embed_tokens(self.model, ids, [image], [self.dataset.grids[int(row)]])
            found.append(self.model(**inputs, logits_to_keep=len(wanted)).logits[0].float())
        longest = max(map(len, found))
        return torch.stack([F.pad(logits, (0, 0, 0, longest - len(logits))) for logits in found])

    def loss(self, outputs: Tensor, full: Tensor) -> Tensor:
        """KL(full ‖ outputs) in nats, mean over the answer's tokens, [b]."""
        length = (full != 0).any(-1).sum(-1)
        full = F.log_softmax(full, dim=-1)
        divergence = (full.exp() * (full - F.log_softmax(outputs, dim=-1))).sum((-2, -1))
        return divergence / length

    def compared(self, outputs: Tensor) -> Tensor:
        """Logits less their mean over the vocabulary: a softmax does not see a constant."""
        return outputs - outputs.mean(-1, keepdim=True)

    def own_shapes(self, outputs: Tensor, rows: Tensor) -> list[torch.Size]:
        lengths = (len(self._wanted(row)) for row in rows.tolist())
        return [torch.Size((length, outputs.shape[-1])) for length in lengths]

    def agreement(self, outputs: Tensor, full: Tensor) -> Tensor:
        """1 where every token of the answer has the most likely next token that `full` has."""
        return (outputs.argmax(-1) == full.argmax(-1)).all(-1).float()

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, rows: Tensor, max_new_tokens: int = 16, request: str = ANSWER
    ) -> list[str]:
        """Generate greedy answers to the `request` of the rows with raw tokens [b, T, D], at once.

        The answers are those of one row at a time but for rounding, which in bf16 can decide
        between two words that are as good as equally likely.
        """
        end = self._ids(END).item()
        # the checkpoint's own settings sample and punish repetition
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        prompts = [self._ids(self.prompt(row, request)) for row in rows.tolist()]
        # padded on the left: the next word of each comes last
        ids = pad_sequence(prompts, True, end, "left")  # [b, L]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        places = torch.arange(ids.shape[1], device=self.device)
        mask = (places >= ids.shape[1] - lengths[:, None]).long()
        grids = [self.dataset.grids[row] for row in rows.tolist()]
        inputs = embed_tokens(self.model, ids, list(tokens), grids, mask)
        new = self.model.generate(**inputs, generation_config=greedy)
        answers = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    @property
    def scores(self) -> dict[str, Score]:
        return {"vqa_accuracy": self.answer_scores, "box_overlap": self.box_scores}

    def answer_scores(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """VQA accuracy of the generated answers, [b] float64; NaN where a row has no answers."""
        generated = self.generate(tokens, rows)
        scores = [
            vqa_accuracy(answer, self.dataset.image_record(row)["answers"])
            for answer, row in zip(generated, rows.tolist(), strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float64)

    def box_scores(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Intersection over union of the generated box and the row's own, [b] float64.

        0 where no box was generated; NaN where a row has none, or one without area.
        """
        generated = self.generate(tokens, rows, max_new_tokens=64, request=LOCATE)
        scores = []
        for text, row in zip(generated, rows.tolist(), strict=True):
            true = box_in_view(self.dataset.image_record(row), self.dataset.manifest["resize"])
            down, across = self.dataset.grids[row]
            found = box_in_text(text, across * self.pixels, down * self.pixels)
            if true is None or min(true[2:]) <= 0:
                scores.append(float("nan"))
            else:
                scores.append(box_overlap(found, true) if found else 0.0)
        return torch.tensor(scores, dtype=torch.float64)

    def prompt(self, row: int, request: str = ANSWER) -> str:
        request = request.format(question=self.dataset.image_record(row)["question"])
        return PROMPT.format(image=IMAGE * math.prod(self.dataset.grids[row]), request=request)

    def reference_answer(self, row: int) -> str | None:
        """Return the row's consensus; None where it has no answer."""
        return consensus(self.dataset.image_record(row)["answers"])

    def _wanted(self, row: int) -> Tensor:
        """Return the tokens of the answer that the row is judged by, and of its end."""
        answer = self.reference_answer(row)
        if answer is None:
            raise InputError(f"row {row} of {self.dataset.cache_dir} has no answer to judge by")
        return self._ids(answer + END)

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=self.device)


def embed_tokens(
    model: Qwen2_5_VLForConditionalGeneration,
    ids: Tensor,
    images: Sequence[Tensor],
    grids: Sequence[Grid],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the inputs of a Qwen2.5-VL model that reads the given vision tokens as its images.

    The result goes into `model(**inputs)` or `model.generate(**inputs)`. It has the positions that
    the pixel path would have: without them the model takes an image for a line of words, and its
    logits differ in silence.

    Args:
        model: with or without its vision tower.
        ids: [b, L] int64, with one `image_token_id` for each vision token.
        images: raw tokens [T_i, D] of each image, in the order of their places in `ids`.
        grids: (rows, columns) of each image.
        mask: [b, L], 0 where `ids` is padding; default none is.
    Raises ValueError where there are more or fewer places than tokens.
    """
    is_image = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids)
    tokens = torch.cat([image.to(embeds) for image in images])
    if len(tokens) != int(is_image.sum()):
        raise ValueError(f"ids has {int(is_image.sum())} places for {len(tokens)} vision tokens")
    mask = torch.ones_like(ids) if mask is None else mask
    merge = model.config.vision_config.spatial_merge_size
    # frames, and patches down and across
    patches = [[1, down * merge, across * merge] for down, across in grids]
    positions, offsets = model.model.get_rope_index(
        ids,
        mm_token_type_ids=is_image.int(),
        image_grid_thw=torch.tensor(patches, device=ids.device),
        attention_mask=mask,
    )
    model.model.rope_deltas = offsets  # where generated words go on
    return {
        "inputs_embeds": embeds.masked_scatter(is_image[..., None], tokens),
        "attention_mask": mask,
        "position_ids": positions,
    }


def consensus(answers: list[str] | None) -> str | None:
    """Return the answer that most people gave, as the first of them wrote it.

    On ties it is the first one, and None where nobody answered.
    """
    answers = [answer for answer in answers or () if answer and answer.strip()]
    plain = [_plain(answer) for answer in answers]
    return max(answers, key=lambda answer: plain.count(_plain(answer)), default=None)


def vqa_accuracy(answer: str, answers: list[str] | None) -> float:
    """Return min(1, people who gave this answer / 3), as in VQA.

    It is 1 or 0 where fewer than 3 were asked.
    """
    if not answers:
        return float("nan")
    same = sum(_plain(answer) == _plain(other) for other in answers)
    return min(1.0, same / min(3, len(answers)))


def box_in_text(text: str, width: int, height: int) -> Box | None:
    """Read the first bbox_2d of an answer, in fractions of an image of width × height pixels."""
    match = BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = map(float, match.groups())
    return x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height


def box_overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (x, y, w, h), 0 to 1; one without area overlaps none."""
    sides, areas = [], [max(w, 0) * max(h, 0) for _, _, w, h in (one, other)]
    for axis in (0, 1):
        ends = min(box[axis] + box[axis + 2] for box in (one, other))
        sides.append(max(0.0, ends - max(one[axis], other[axis])))
    shared = sides[0] * sides[1]
    return shared / (sum(areas) - shared) if min(areas) > 0 else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .,!?\"'").split())


def _check_rows(dataset: RealQwenVLDataset) -> None:
    """Refuse a cache in which rows have no question to ask, or no answer to judge by."""
    for column, filled in (("question", str.strip), ("answers", consensus)):
        values = dataset.rows[column].to_pylist()
        if bare := [str(row) for row, value in enumerate(values) if not (value and filled(value))]:
            shown = ", ".join(bare[:5]) + (f" and {len(bare) - 5} more" if len(bare) > 5 else "")
            raise InputError(
                f"{dataset.cache_dir}: row {shown} without {column}, which the head qwen-answer "
                "needs: extract a data set whose rows all have question and answer"
            )


def _folder_of(dataset: RealQwenVLDataset, name: str | None) -> Path:
    """Find the folder of the checkpoint called `name`, or (None) of the cache's own encoder.

    A hub's checkpoint is that of the revision that the cache records. Raises InputError where it
    cannot be found, and where its vision tower is another than the one that made the tokens.
    """
    encoder, remedy = dataset.manifest["encoder"], "type --head_model with its folder or hub id"
    revision, recorded = encoder.get("revision"), dataset.manifest.get("encoder_folder")
    if name is None and not revision:
        if not recorded:
            raise InputError(
                f"{dataset.cache_dir} does not say where the checkpoint of its encoder "
                f"{encoder['id']} lies: {remedy}"
            )
        if not Path(recorded).is_dir():
            raise InputError(
                f"{dataset.cache_dir} was made with {recorded}, which is not there: {remedy}"
            )
    name = name or (encoder["id"] if revision else recorded)
    folder = whole_checkpoint_folder(name, revision if name == encoder["id"] else None)
    width, weights = tower_of_checkpoint(folder)
    if width != dataset.feature_dim:
        raise InputError(
            f"{name} reads tokens of {width} features, {dataset.cache_dir} holds tokens of "
            f"{dataset.feature_dim}: name the checkpoint that the cache was made with"
        )
    # nothing is known of the encoder of imported features
    if (made_with := encoder.get("weights_sha256")) and made_with != weights:
        raise InputError(
            f"{name} has another vision tower (sha256 {weights[:12]}) than the one that made the "
            f"tokens of {dataset.cache_dir} ({made_with[:12]}): name the checkpoint that the cache "
            "was made with"
        )
    return folder


def _read(kind: type, folder: Path, **options):
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: {reason}: type the folder or hub id of a whole Qwen2.5-VL checkpoint"
        ) from error
