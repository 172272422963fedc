"""Heads, the task's metric, and what a factorisation in it keeps of the head's output."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import cli
import encoders
import extract_features
import language_model
import task_heads
from cli import UserError
from qwenvl_dataloader import RealQwenVLDataset, denormalise, normalise
from test_encoders import PREPROCESSOR, photograph, random_image


@pytest.fixture(scope="module")
def dataset(tiny_cache) -> RealQwenVLDataset:
    return RealQwenVLDataset(tiny_cache)


@pytest.fixture(scope="module")
def saliency(dataset) -> task_heads.TaskHead:
    return task_heads.load_head("saliency", dataset, device="cpu")


# ---------------------------------------------------------------------------------------- saliency


def test_the_saliency_head_gives_the_logits_and_the_map_of_its_onnx_graph():
    encoder = encoders.load_encoder("demo", device="cpu", image_size=224)
    pixels = torch.stack([encoder.preprocess(photograph()), encoder.preprocess(random_image(9, 7))])
    graph = onnx.load(encoders.demo_onnx_path())
    names = ["/decoder/final_conv/Conv_output_0", "output_importance"]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(names[0], onnx.TensorProto.FLOAT, None)
    )
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(names, {"input_image": pixels.numpy()})
    logits, importance = (torch.from_numpy(array)[:, 0] for array in expected)
    head = task_heads.SaliencyHead.__new__(task_heads.SaliencyHead)
    head.grid, head.decoder = encoder.grid, task_heads.load_saliency_decoder()
    found = head.outputs(encoder.encode(pixels))  # merged tokens [2, 64, 1536]
    assert found.shape == logits.shape == (2, 128, 128)
    assert (found - logits).norm() / logits.norm() < 1e-5
    # the graph ends in a linear resize to the image's size and a sigmoid
    resized = torch.nn.functional.interpolate(found[:, None], (224, 224), mode="bilinear")
    assert (resized[:, 0].sigmoid() - importance).abs().max() < 1e-4


def test_splitting_neighbours_undoes_their_merging():
    patches = torch.randn(2, 4 * 6, 5)
    merged = encoders.merge_neighbours(patches, (4, 6))
    split = task_heads.split_neighbours(merged, (2, 3))
    assert torch.equal(split, patches.mT.reshape(2, 5, 4, 6))


def test_the_saliency_heads_gradient_is_the_slope_of_its_loss(saliency, dataset):
    tokens = dataset[[0]].double()
    saliency.decoder.double()
    try:
        full = saliency.decoder(task_heads.split_neighbours(tokens, dataset.grid))

        def loss(x):
            patches = task_heads.split_neighbours(x, dataset.grid)
            return saliency.loss(saliency.decoder(patches), full).sum()

        start = (tokens + 0.1 * tokens.std() * torch.randn_like(tokens)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(start), start)
        direction = gradient / gradient.norm()
        step = 1e-5 * direction
        slope = (loss(start + step) - loss(start - step)) / 2e-5
    finally:
        saliency.decoder.float()
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_a_head_agrees_with_itself_and_its_error_is_relative(saliency, dataset):
    y = saliency.outputs(dataset[[0, 1]])
    assert saliency.error(y, y).tolist() == [0, 0] and saliency.agreement(y, y).tolist() == [1, 1]
    assert saliency.error(1.25 * y, y).tolist() == pytest.approx([0.25, 0.25], rel=1e-5)
    assert saliency.agreement(-y, y).max() == 0


def test_the_saliency_head_refuses_tokens_of_another_encoder(cache_copy):
    path = cache_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoder"]["id"] = "Qwen/Qwen2.5-VL-3B-Instruct"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--head saliency reads tokens of demo-dinov2"):
        task_heads.load_head("saliency", RealQwenVLDataset(cache_copy), device="cpu")


def test_an_unknown_head_is_refused_with_the_list(dataset):
    with pytest.raises(UserError, match="--head depth is unknown: type one of saliency, qwen"):
        task_heads.load_head("depth", dataset, device="cpu")


# ------------------------------------------------------------------------------------- qwen-answer


@pytest.fixture(scope="module")
def small_qwen(tiny_data, tmp_path_factory):
    """Folder of a whole small checkpoint in the real layout: T = 16 at 112 pixels, D = 64."""
    folder = tmp_path_factory.mktemp("qwen_head") / "small-qwen"
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    words = "system You are a helpful assistant . user Answer the question using single word or"
    table = extract_features.DatasetRows(sorted((tiny_data / "data").glob("*.parquet")))
    rows = [row for batch in table.batches(16) for _, row in batch]
    texts = [words] + [row["question"] for row in rows] + [a for r in rows for a in r["answer"]]
    split = pre_tokenizers.Whitespace()
    known = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {w: i for i, w in enumerate(special + ["[UNK]", "phrase", "assistant", *known])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = split
    core.add_special_tokens(special)
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 112}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"vocab_size": len(vocabulary), "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    ids = {"image_token_id": 3, "vision_start_token_id": 2, "vision_end_token_id": 4}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # fresh weights are so small that every answer is alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def qwen_cache(small_qwen, tiny_data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("qwen_cache") / "cache"
    argv = ["--model", small_qwen, "--dataset_dir", tiny_data, "--cache_dir", cache]
    argv += ["--image_size", "112"]
    extract_features.main(cli.parse(extract_features.get_args_parser(), [str(a) for a in argv]))
    return cache


@pytest.fixture(scope="module")
def qwen_head(small_qwen, qwen_cache):
    dataset = RealQwenVLDataset(qwen_cache)
    return task_heads.load_head("qwen-answer", dataset, device="cpu", model=str(small_qwen))


def test_with_unchanged_tokens_the_answers_logits_are_the_whole_qwens_bit_for_bit(
    qwen_head, small_qwen, tiny_data
):
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(small_qwen).eval()
    encoder = encoders.load_encoder(str(small_qwen), device="cpu", image_size=112)
    pixels = encoder.preprocess(photograph())
    tokens = encoder.encode(pixels[None])
    row = 1
    answer = qwen_head.reference_answer(row)
    text = qwen_head.prompt(row) + answer + "<|im_end|>"
    ids = qwen_head.tokenizer(text, return_tensors="pt")["input_ids"]
    wanted = len(qwen_head.tokenizer(answer + "<|im_end|>")["input_ids"])
    with torch.no_grad():
        expected = whole(
            input_ids=ids[:, :-1],
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 8, 8]]),
            mm_token_type_ids=(ids[:, :-1] == 3).int(),
            logits_to_keep=wanted,
        ).logits
    logits = qwen_head.outputs(tokens, torch.tensor([row]))
    assert logits.shape == (1, wanted, len(qwen_head.tokenizer))
    assert torch.equal(logits, expected)
    assert not torch.equal(qwen_head.outputs(tokens.flip(1), torch.tensor([row])), expected)


def test_the_greedy_answer_is_the_argmax_of_one_forward_after_another(qwen_head, qwen_cache):
    dataset, row = RealQwenVLDataset(qwen_cache), 4
    tokens = dataset[[row]].float()
    ids, end = qwen_head._ids(qwen_head.prompt(row)), qwen_head._ids("<|im_end|>")
    new = []
    for _ in range(4):
        logits = qwen_head.model(**qwen_head._inputs(ids, tokens[0])).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
        new.append(int(ids[-1]))
        if new[-1] == end:
            break
    expected = qwen_head.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert qwen_head.generate(tokens, torch.tensor([row]), max_new_tokens=4) == [expected]


def test_kl_and_agreement_of_the_answer_ignore_the_padding_of_shorter_answers(
    qwen_head, qwen_cache
):
    dataset = RealQwenVLDataset(qwen_cache)
    tokens = dataset[[0, 1, 2]].float()
    rows = torch.tensor([0, 1, 2])
    full = qwen_head.outputs(tokens, rows)
    changed = qwen_head.outputs(tokens + 0.5 * torch.randn_like(tokens), rows)
    together = qwen_head.loss(changed, full)
    for i in range(3):
        length = int((full[i] != 0).any(-1).sum())
        p, q = full[i, :length].softmax(-1), changed[i, :length].softmax(-1)
        by_hand = (p * (p / q).log()).sum() / length
        assert float(together[i]) == pytest.approx(float(by_hand), rel=1e-3)
    assert qwen_head.loss(full, full).abs().max() < 1e-6
    assert qwen_head.agreement(full, full).tolist() == [1, 1, 1]


def test_gradients_reach_the_tokens_through_the_frozen_language_model(qwen_head, qwen_cache):
    tokens = RealQwenVLDataset(qwen_cache)[[0]].float().requires_grad_()
    rows = torch.tensor([0])
    with torch.no_grad():
        full = qwen_head.outputs(tokens.flip(1), rows)
    qwen_head.loss(qwen_head.outputs(tokens, rows), full).sum().backward()
    assert tokens.grad.isfinite().all() and (tokens.grad.norm(dim=-1) > 0).all()
    assert all(p.grad is None for p in qwen_head.model.parameters())


def test_the_language_model_refuses_tokens_of_another_width(small_qwen, dataset):
    with pytest.raises(UserError, match="reads tokens of 64 features.*tokens of 1536"):
        task_heads.load_head("qwen-answer", dataset, device="cpu", model=str(small_qwen))


def test_a_checkpoint_without_its_language_model_is_refused_in_one_line(qwen_cache, tmp_path):
    with pytest.raises(UserError, match="no-such-model") as refused:
        dataset = RealQwenVLDataset(qwen_cache)
        task_heads.load_head("qwen-answer", dataset, device="cpu", model="/no-such-model")
    assert "\n" not in str(refused.value)


def test_vqa_accuracy_counts_people_who_gave_the_answer():
    ten = ["stop"] * 2 + ["Stop!"] + ["halt"] + ["go"] * 6
    assert language_model.vqa_accuracy("stop.", ten) == 1
    assert language_model.vqa_accuracy("halt", ten) == pytest.approx(1 / 3)
    assert language_model.vqa_accuracy("halt", ["halt"]) == 1
    assert np.isnan(language_model.vqa_accuracy("halt", []))
