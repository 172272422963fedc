"""The head qwen-answer: Qwen2.5-VL's own language model on given tokens, on small checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QWEN_PREPROCESSOR
from safetensors.torch import load_file, save_file
from test_encoders import photograph
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import extract_features
from common import arguments
from encoders import checkpoints
from encoders import towers as encoders
from encoders.image_sources import read_image_file
from heads import qwen_answer as language_model
from heads.load_head import load_head
from heads.metric import probe_gradients
from lowrank_tokens import Codec
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import BatchLoader, RealQwenVLDataset


@pytest.fixture(scope="module")
def small_qwen(tiny_data, tmp_path_factory):
    """Folder of a whole small checkpoint in the real layout: T = 16 at 112 pixels, D = 64."""
    folder = tmp_path_factory.mktemp("qwen_head") / "small-qwen"
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    words = "system You are a helpful assistant . user Answer the question using single word or"
    (path,) = (tiny_data / "data").glob("*.parquet")
    rows = pq.read_table(path, columns=["question", "answer"]).to_pylist()
    texts = [words] + [row["question"] for row in rows] + [a for r in rows for a in r["answer"]]
    split = pre_tokenizers.Whitespace()
    known = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    known = dict.fromkeys(special + ["[UNK]", "phrase", "assistant", *known])
    vocabulary = {word: i for i, word in enumerate(known)}
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
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def qwen_cache(small_qwen, tiny_data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("qwen_cache") / "cache"
    argv = ["--model", small_qwen, "--dataset_dir", tiny_data, "--cache_dir", cache]
    argv += ["--image_size", "112"]
    extract_features.main(
        arguments.parse(extract_features.get_args_parser(), [str(a) for a in argv])
    )
    return cache


@pytest.fixture(scope="module")
def qwen_head(small_qwen, qwen_cache):
    dataset = RealQwenVLDataset(qwen_cache)
    return load_head("qwen-answer", dataset, device="cpu", model=str(small_qwen))


def test_with_unchanged_tokens_the_answers_logits_are_the_whole_qwens_bit_for_bit(
    qwen_head, small_qwen, tiny_data
):
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(small_qwen).eval()
    encoder = encoders.load_encoder(str(small_qwen), device="cpu", image_size=112)
    pixels = encoder.preprocess(photograph())  # [4, 4, 4, 1176]
    tokens = encoder.encode(pixels[None])
    row = 1
    answer = qwen_head.reference_answer(row)
    text = qwen_head.prompt(row) + answer + "<|im_end|>"
    ids = qwen_head.tokenizer(text, return_tensors="pt")["input_ids"]
    wanted = len(qwen_head.tokenizer(answer + "<|im_end|>")["input_ids"])
    with torch.no_grad():
        expected = whole(
            input_ids=ids[:, :-1],
            pixel_values=pixels.flatten(0, 2),
            image_grid_thw=torch.tensor([[1, 8, 8]]),
            mm_token_type_ids=(ids[:, :-1] == 3).int(),
            logits_to_keep=wanted,
        ).logits
    logits = qwen_head.outputs(tokens, torch.tensor([row]))
    assert logits.shape == (1, wanted, len(qwen_head.tokenizer))
    assert torch.equal(logits, expected)
    assert not torch.equal(qwen_head.outputs(tokens.flip(1), torch.tensor([row])), expected)


def test_an_image_of_any_grid_is_read_as_the_whole_qwen_reads_it(small_qwen, tiny_data, tmp_path):
    argv = ["--model", small_qwen, "--dataset_dir", tiny_data, "--cache_dir", tmp_path / "cache"]
    argv += ["--resize", "native", "--max_pixels", 24 * 28**2]
    extract_features.main(
        arguments.parse(extract_features.get_args_parser(), [str(a) for a in argv])
    )
    dataset = RealQwenVLDataset(tmp_path / "cache")
    head = load_head("qwen-answer", dataset, device="cpu", model=str(small_qwen))
    rows = [dataset.grids.index(grid) for grid in sorted(set(dataset.grids))]
    assert len(rows) > 2
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(small_qwen).eval()
    for row in rows:
        tokens, (down, across) = dataset[[row]].float(), dataset.grids[row]
        text = head.prompt(row) + head.reference_answer(row) + "<|im_end|>"
        ids = head.tokenizer(text, return_tensors="pt")["input_ids"][:, :-1]
        embedded = whole.get_input_embeddings()(ids)
        embedded[ids == 3] = tokens[0]
        thw = torch.tensor([[1, 2 * down, 2 * across]])
        kinds = (ids == 3).int()
        with torch.no_grad():
            places = whole.model.get_rope_index(ids, kinds, image_grid_thw=thw)[0]
            expected = whole(inputs_embeds=embedded, position_ids=places).logits[0]
        logits = head.outputs(tokens, torch.tensor([row]))[0]
        assert torch.allclose(logits, expected[-len(logits) :], atol=1e-4), (down, across)


def test_the_greedy_answer_is_the_argmax_of_one_forward_after_another(qwen_head, qwen_cache):
    dataset, row = RealQwenVLDataset(qwen_cache), 4
    tokens = dataset[[row]].float()
    ids, end = qwen_head._ids(qwen_head.prompt(row)), qwen_head._ids("<|im_end|>")
    new = []
    for _ in range(4):
        logits = qwen_head.model(
            **language_model.embed_tokens(
                qwen_head.model, ids[None], [tokens[0]], [dataset.grids[row]]
            )
        ).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
        new.append(int(ids[-1]))
        if new[-1] == end:
            break
    expected = qwen_head.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert qwen_head.generate(tokens, torch.tensor([row]), max_new_tokens=4) == [expected]


def test_answers_of_a_batch_are_those_of_one_image_at_a_time(qwen_head, qwen_cache):
    dataset, rows = RealQwenVLDataset(qwen_cache), torch.arange(8)
    tokens = dataset[rows].float()
    lengths = {len(qwen_head._ids(qwen_head.prompt(row))) for row in rows.tolist()}
    assert len(lengths) > 1  # some are padded
    alone = [qwen_head.generate(tokens[i : i + 1], rows[i : i + 1])[0] for i in rows.tolist()]
    assert qwen_head.generate(tokens, rows) == alone
    assert len(set(alone)) > 1


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


def test_a_constant_added_to_all_logits_is_no_error(qwen_head, qwen_cache):
    rows = torch.tensor([0, 1, 2])
    full = qwen_head.outputs(RealQwenVLDataset(qwen_cache)[[0, 1, 2]].float(), rows)
    assert qwen_head.error(full + 30, full).max() < 1e-5
    assert qwen_head.loss(full + 30, full).abs().max() < 1e-4
    # what is not the same for all counts as before
    centred = full - full.mean(-1, keepdim=True)
    assert qwen_head.error(full + 0.25 * centred, full).tolist() == pytest.approx([0.25] * 3)


def test_a_probe_does_not_depend_on_the_longest_answer_of_its_batch(qwen_head, qwen_cache):
    dataset = RealQwenVLDataset(qwen_cache)
    lengths = {}
    for row in range(len(dataset)):
        lengths.setdefault(len(qwen_head._wanted(row)), row)
    short, long = lengths[min(lengths)], lengths[max(lengths)]
    assert min(lengths) < max(lengths)
    loaders = (
        BatchLoader(dataset, torch.tensor(rows), 2, torch.device("cpu"))
        for rows in ([short], [short, long])
    )
    alone, beside = (probe_gradients(qwen_head, next(iter(loader)), 0, 1) for loader in loaders)
    assert torch.allclose(alone[0], beside[0], rtol=1e-4, atol=1e-6 * float(alone.abs().max()))


def test_gradients_reach_the_tokens_through_the_frozen_language_model(qwen_head, qwen_cache):
    tokens = RealQwenVLDataset(qwen_cache)[[0]].float().requires_grad_()
    rows = torch.tensor([0])
    with torch.no_grad():
        full = qwen_head.outputs(tokens.flip(1), rows)
    qwen_head.loss(qwen_head.outputs(tokens, rows), full).sum().backward()
    assert tokens.grad.isfinite().all() and (tokens.grad.norm(dim=-1) > 0).all()
    assert all(p.grad is None for p in qwen_head.model.parameters())


def test_the_language_model_refuses_tokens_of_another_width(small_qwen, tiny_cache):
    dataset = RealQwenVLDataset(tiny_cache)
    with pytest.raises(InputError, match="reads tokens of 64 features.*tokens of 1536"):
        load_head("qwen-answer", dataset, device="cpu", model=str(small_qwen))


def test_a_cache_made_from_a_folder_finds_its_language_model_again(
    small_qwen, qwen_cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    dataset = RealQwenVLDataset(qwen_cache)
    found = load_head("qwen-answer", dataset, device="cpu")
    assert found.sha256 == checkpoints.checkpoint_weights_sha256(small_qwen)
    del dataset.manifest["encoder_folder"]  # a cache of an older version
    with pytest.raises(InputError, match="does not say where.*small-qwen.*--head_model"):
        load_head("qwen-answer", dataset, device="cpu")
    dataset.manifest["encoder_folder"] = str(tmp_path / "moved")
    with pytest.raises(InputError, match="moved, which is not there: type --head_model"):
        load_head("qwen-answer", dataset, device="cpu")


def test_a_language_model_beside_another_vision_tower_is_refused(small_qwen, qwen_cache, tmp_path):
    other = Path(shutil.copytree(small_qwen, tmp_path / "other"))
    path = other / checkpoints.SINGLE_SHARD
    tensors = load_file(path)
    next(t for key, t in tensors.items() if "visual." in key).view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="other has another vision tower .*name the checkpoint"):
        load_head("qwen-answer", RealQwenVLDataset(qwen_cache), device="cpu", model=str(other))


def test_a_hubs_language_model_is_that_of_the_recorded_revision(
    small_qwen, qwen_cache, monkeypatch
):
    asked = []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(small_qwen)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    dataset = RealQwenVLDataset(qwen_cache)
    dataset.manifest["encoder"] |= {"id": "Qwen/some", "revision": "aaa111"}
    load_head("qwen-answer", dataset, device="cpu")
    load_head("qwen-answer", dataset, device="cpu", model="Qwen/some")
    assert asked == [("Qwen/some", "aaa111")] * 4  # the configs, then the rest


def test_a_hubs_checkpoint_of_another_family_is_refused_before_its_weights_are_fetched(
    small_qwen, tmp_path, monkeypatch
):
    fetched = []

    def download(name, revision=None, allow_patterns=(), **_):
        fetched.append(allow_patterns)
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    with pytest.raises(InputError, match=r"deepstack features.*such as Qwen/Qwen2.5[^:]*$"):
        checkpoints.whole_checkpoint_folder("Qwen/some-3")
    assert fetched == [checkpoints.CONFIG_FILES]


def test_a_language_model_of_another_family_is_refused_by_its_type(qwen_cache, tmp_path):
    dataset = RealQwenVLDataset(qwen_cache)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(
        InputError,
        match="'qwen3_vl' is not supported as a language model .*deepstack.*'qwen2_5_vl'",
    ):
        load_head("qwen-answer", dataset, device="cpu", model=str(tmp_path))


def test_a_checkpoint_without_its_language_model_is_refused_in_one_line(qwen_cache, tmp_path):
    with pytest.raises(InputError, match="no-such-model") as refused:
        dataset = RealQwenVLDataset(qwen_cache)
        load_head("qwen-answer", dataset, device="cpu", model="/no-such-model")
    assert "\n" not in str(refused.value)


def test_the_answer_of_a_row_is_the_one_that_most_people_gave():
    consensus = language_model.consensus
    assert consensus(["halt", "Stop!", "stop", "go", "go"]) == "Stop!"
    assert consensus(["b", "a", "a"]) == "a"
    assert consensus(["", "only"]) == "only"
    assert consensus(["  "]) is consensus([]) is consensus(None) is None


@pytest.mark.parametrize("column", ["question", "answers"])
def test_rows_without_question_or_answer_are_found_when_the_head_is_loaded(
    column, small_qwen, qwen_cache
):
    dataset = RealQwenVLDataset(qwen_cache)
    values = dataset.rows[column].to_pylist()
    values[3], values[7] = None, "" if column == "question" else [""]
    index = dataset.rows.column_names.index(column)
    kind = dataset.rows.schema.field(column)
    dataset.rows = dataset.rows.set_column(index, kind, pa.array(values, kind.type))
    with pytest.raises(InputError, match=f"row 3, 7 without {column}") as refused:
        load_head("qwen-answer", dataset, device="cpu", model=str(small_qwen))
    assert "\n" not in str(refused.value)


def test_vqa_accuracy_counts_people_who_gave_the_answer():
    ten = ["stop"] * 2 + ["Stop!"] + ["halt"] + ["go"] * 6
    assert language_model.vqa_accuracy("stop.", ten) == 1
    assert language_model.vqa_accuracy("halt", ten) == pytest.approx(1 / 3)
    assert language_model.vqa_accuracy("halt", ["halt"]) == 1
    assert np.isnan(language_model.vqa_accuracy("halt", []))


def test_boxes_are_read_from_qwens_json_and_scored_by_their_overlap():
    text = 'Here it is:\n```json\n[\n\t{"bbox_2d": [112, 56, 224.0, 168], "label": "stop"}\n]\n```'
    found = language_model.box_in_text(text, width=448, height=224)
    assert found == (0.25, 0.25, 0.25, 0.5)
    assert language_model.box_in_text("There is no text in the image.", 448, 448) is None
    assert language_model.box_in_text('{"bbox_2d": [1, 2, 3]}', 448, 448) is None
    overlap = language_model.box_overlap
    assert overlap(found, found) == 1
    assert overlap((0, 0, 1, 1), (0.5, 0, 1, 1)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 0.2, 0.2), (0.5, 0.5, 0.2, 0.2)) == 0
    assert overlap((0.5, 0.5, -0.1, 0.2), (0, 0, 1, 1)) == 0  # corners the wrong way round


def test_a_generated_box_is_held_against_the_rows_own_in_the_square_that_the_tower_saw(
    qwen_head, qwen_cache, monkeypatch
):
    dataset = RealQwenVLDataset(qwen_cache)
    record = dataset.image_record(2)
    x, y, w, h = record["bbox"]
    across, down = 112 / record["width"], 112 / record["height"]  # stretched to 112 × 112 pixels
    corners = [x * across, y * down, (x + w) * across, (y + h) * down]
    said = [json.dumps([{"bbox_2d": corners, "label": "sign"}]), "nowhere"]
    asked = []

    def generate(tokens, rows, max_new_tokens, request):
        asked.append(request)
        return said

    monkeypatch.setattr(qwen_head, "generate", generate)
    scores = qwen_head.box_scores(dataset[[2, 2]].float(), torch.tensor([2, 2]))
    assert scores.tolist() == [pytest.approx(1), 0] and "bbox" in asked[0]


@pytest.mark.slow
def test_every_step_runs_end_to_end_on_qwens_own_head(qwen_cache, script, tmp_path):
    options = ["--cache_dir", qwen_cache, "--head", "qwen-answer"]  # the checkpoint: the cache's
    path = tmp_path / "qwen.safetensors"
    done = script("experiments.estimate_metric", *options, "--probes", 1, "--out", path)
    assert done.returncode == 0, done.stderr
    files = ["--results_dir", tmp_path / "task", "--log_dir", tmp_path / "log"]
    done = script(
        "train_real_data.py",
        "--cache_dir",
        qwen_cache,
        "--task_head",
        "qwen-answer",
        "--metric",
        path,
        "--rank",
        4,
        "--epochs",
        1,
        *files,
    )
    assert done.returncode == 0, done.stderr
    assert "val_task_error" in done.stdout
    history = json.loads((tmp_path / "task" / "ResMLP" / "history.json").read_text())
    assert history[-1]["val_task_loss"] > 0
    codec, coded = tmp_path / "codec.safetensors", tmp_path / "coded"
    cache = ["--cache_dir", qwen_cache]
    assert script("experiments.fit_codec", *cache, "--out", codec).returncode == 0
    files = ["--codec", codec, "--out", coded]
    done = script("factorize.py", *cache, "--exact", *files, "--step", 1)
    assert done.returncode == 0, done.stderr
    asked = ["--metric", path, "--ranks", 2, 4, "--boxes", "--results_dir", tmp_path / "task"]
    asked += ["--coded", coded]
    done = script("experiments.answers", *options, *asked)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "task" / "ResMLP" / "answers.json").read_text())
    assert results["head"] == "qwen-answer"
    assert list(results["bytes"]) == [str(coded)] and results["bytes"][str(coded)] > 8
    assert f"{coded}, " in done.stdout
    methods = ("full_tokens", "network, rank 2", "svd, rank 4", "svd_in_metric, rank 4", str(coded))
    for found in (results["methods"][name] for name in methods):
        assert 0 <= found["vqa_accuracy"]["mean"] <= 1 and 0 <= found["box_overlap"]["mean"] <= 1
    done = script(
        "compare_svd_nn.py", "--cache_dir", qwen_cache, "--results_dir", tmp_path / "task"
    )
    assert done.returncode == 0 and "task error of the head qwen-answer" in done.stdout


def into_qwen(folder, *flags):
    """Run examples/into_qwen.py on a picture, in this process."""
    import importlib.util

    path = Path(__file__).parents[1] / "examples" / "into_qwen.py"
    spec = importlib.util.spec_from_file_location("into_qwen", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    photograph().save(folder / "picture.png")
    argv = [str(folder / "picture.png"), "What is it?", "--image_size", "112", *map(str, flags)]
    module.main(arguments.parse(module.get_args_parser(), argv))


def test_uncoded_tokens_give_the_logits_of_the_pixel_path_in_the_example(
    small_qwen, tmp_path, capsys
):
    into_qwen(tmp_path, "--model", small_qwen, "--check")
    assert "largest difference of a logit to the pixel path: 0\n" in capsys.readouterr().out


def test_coded_tokens_go_back_into_the_model_in_the_example(
    small_qwen, qwen_cache, tmp_path, capsys
):
    dataset = RealQwenVLDataset(qwen_cache)
    rows = dataset.split.train.tolist()
    Codec.fit([(dataset[rows], dataset.grid)]).save(tmp_path / "codec.safetensors")
    into_qwen(tmp_path, "--model", small_qwen, "--codec", tmp_path / "codec.safetensors")
    said = capsys.readouterr().out
    assert "2048 bytes of tokens (bf16) became" in said and "answer:" in said


def test_a_codec_of_another_tower_and_what_is_no_picture_are_refused_by_the_example(
    small_qwen, qwen_cache, tmp_path
):
    dataset = RealQwenVLDataset(qwen_cache)
    info = {"encoder": {"id": "Qwen/some", "weights_sha256": "0" * 64}}
    codec = Codec.fit([(dataset[dataset.split.train], dataset.grid)], info=info)
    codec.save(tmp_path / "codec.safetensors")
    with pytest.raises(InputError, match="--codec .* was fitted to encoder weights 0000"):
        into_qwen(tmp_path, "--model", small_qwen, "--codec", tmp_path / "codec.safetensors")
    for name in ("nowhere.png", "codec.safetensors"):
        with pytest.raises(InputError, match=f"{name} cannot be read as an image"):
            read_image_file(tmp_path / name)


def test_qwen3s_deepstack_features_are_refused_by_the_example(small_qwen, tmp_path):
    folder = Path(shutil.copytree(small_qwen, tmp_path / "qwen3"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(InputError, match="deepstack features"):
        into_qwen(tmp_path, "--model", folder, "--check")


def test_more_tokens_than_places_are_refused(qwen_head):
    ids = torch.tensor([[3, 3, 0]])
    with pytest.raises(ValueError, match="2 places for 4 vision tokens"):
        language_model.embed_tokens(qwen_head.model, ids, [torch.zeros(4, 64)], [(2, 2)])
