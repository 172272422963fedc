"""The saliency head: equal to its published graph, and refused for other tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from test_encoders import photograph, random_image

from encoders import demo_weights
from encoders import towers as encoders
from heads import saliency as heads
from heads import task_head
from heads.load_head import load_head
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset


def test_the_saliency_head_gives_the_logits_and_the_map_of_its_onnx_graph():
    encoder = encoders.load_encoder("demo", device="cpu", image_size=224)
    pixels = torch.stack([encoder.preprocess(photograph()), encoder.preprocess(random_image(9, 7))])
    graph = onnx.load(demo_weights.demo_onnx_path())
    names = ["/decoder/final_conv/Conv_output_0", "output_importance"]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(names[0], onnx.TensorProto.FLOAT, None)
    )
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(names, {"input_image": pixels.numpy()})
    logits, importance = (torch.from_numpy(array)[:, 0] for array in expected)
    head = heads.SaliencyHead.__new__(heads.SaliencyHead)
    head.dataset = SimpleNamespace(grid=encoder.grid)
    head.decoder = heads.load_saliency_decoder()
    found = head.outputs(encoder.encode(pixels))  # merged tokens [2, 64, 1536]
    assert found.shape == logits.shape == (2, 128, 128)
    assert (found - logits).norm() / logits.norm() < 1e-5
    # the graph ends in a linear resize to the image's size and a sigmoid
    resized = torch.nn.functional.interpolate(found[:, None], (224, 224), mode="bilinear")
    assert (resized[:, 0].sigmoid() - importance).abs().max() < 1e-4


def test_splitting_neighbours_undoes_their_merging():
    patches = torch.randn(2, 4 * 6, 5)
    merged = encoders.merge_neighbours(patches, (4, 6))
    split = heads.split_neighbours(merged, (2, 3))
    assert torch.equal(split, patches.mT.reshape(2, 5, 4, 6))


def test_the_saliency_heads_gradient_is_the_slope_of_its_loss(saliency, dataset):
    tokens = dataset[[0]].double()
    saliency.decoder.double()
    try:
        full = saliency.decoder(heads.split_neighbours(tokens, dataset.grid))

        def loss(x):
            patches = heads.split_neighbours(x, dataset.grid)
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


def test_a_head_reads_full_tokens_once_and_gives_the_same_in_another_order(
    dataset, test_batch, monkeypatch
):
    head = load_head("saliency", dataset, device="cpu")
    read, outputs = [], head.outputs
    monkeypatch.setattr(head, "outputs", lambda x, rows: read.append(len(x)) or outputs(x, rows))
    with torch.inference_mode():  # as validation calls it first
        first = head.of_full(test_batch)
    order = torch.randperm(len(test_batch.rows))
    shuffled = test_batch._replace(rows=test_batch.rows[order], x=test_batch.x[order] + 1)
    assert torch.equal(head.of_full(shuffled), first[order])
    assert read == [len(test_batch.rows)]
    # its output can stand in a loss with a gradient, though it was made without one
    x = test_batch.x.clone().requires_grad_()
    head.loss(head.of_batch(test_batch, 0.9 * x), head.of_full(test_batch)).sum().backward()
    assert x.grad.abs().max() > 0
    # what does not fit is computed anew each time
    monkeypatch.setattr(task_head, "FULL_KEPT", 0)
    del head._kept
    assert torch.equal(head.of_full(test_batch), head.of_full(test_batch))
    assert len(read) == 4


def test_the_saliency_head_refuses_tokens_of_another_encoder(cache_copy):
    path = cache_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoder"]["id"] = "Qwen/Qwen2.5-VL-3B-Instruct"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="--head saliency reads tokens of demo-dinov2"):
        load_head("saliency", RealQwenVLDataset(cache_copy), device="cpu")


def test_an_unknown_head_is_refused_with_the_list(dataset):
    with pytest.raises(InputError, match="--head depth is unknown: type one of saliency, qwen"):
        load_head("depth", dataset, device="cpu")
