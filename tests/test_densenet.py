import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from densenet import ARCHITECTURES, DenseNet, densenet121


def count(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in DenseNet(**options).parameters())


def test_parameter_counts_are_those_of_the_paper():
    """Those of its networks by name are in README.md, which a test compares with the code."""
    assert count(depth=40) == 176_122
    # The first convolution of the Lua code and of bamos/densenet.pytorch has 2k channels without bottlenecks, too.
    assert count(depth=100, bottleneck=False, reduction=1.0, init_channels=24) == 7_083_538


@pytest.mark.parametrize(("options", "words"), [
    ({"depth": 43}, "depth 43: .* 6n \\+ 4, such as 40 or 46"),
    ({"depth": 41, "bottleneck": False}, "3n \\+ 4, such as 40 or 43"),
    ({"depth": 4}, "such as 10"),
    ({"reduction": 0.0}, r"reduction 0.0: needs a number in \(0, 1\]"),
    ({"reduction": 1.5}, "reduction 1.5"),
    ({"reduction": 0.001}, "reduction 0.001: leaves a transition without channels"),
    ({"drop_rate": 1.0}, "drop rate 1.0"),
    ({"growth_rate": 0}, "growth rate 0"),
    ({"init_channels": 0}, "initial channels 0"),
    ({"num_classes": 0}, "0 classes"),
    ({"in_channels": 0}, "0 input channels"),
    ({"block": "fast"}, "block 'fast': choose one of naive"),
    ({"stem": "big"}, "stem 'big'"),
])  # fmt: skip
def test_impossible_architectures_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        DenseNet(**options)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 1, 33, 47), (1, 4, 224, 224)])
def test_any_image_size_and_a_batch_of_one(shape):
    assert DenseNet(depth=10, growth_rate=4, in_channels=shape[1])(torch.randn(shape)).shape == (shape[0], 10)


def test_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    model = DenseNet(depth=40, growth_rate=24)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            k = module.kernel_size[0]
            assert module.weight.std().item() == pytest.approx((2 / (k * k * module.out_channels)) ** 0.5, rel=0.15)
            assert abs(module.weight.mean().item()) < 0.15 * module.weight.std().item()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (model.classifier.bias == 0).all()


def test_hooks_see_outputs_that_nothing_overwrites():
    model, seen = DenseNet(depth=10, growth_rate=4), []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    model(torch.randn(2, 3, 8, 8))
    assert len(seen) == 1 + 3 * 6 + 2 * 3 + 3  # stem, layers, transitions, last norm, ReLU and classifier
    assert all(torch.equal(output, copy) for output, copy in seen)


def test_features_and_another_classifier():
    """As timm has them."""
    model = DenseNet(depth=10, growth_rate=4).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    features = model.forward_features(x)
    assert features.shape == (2, 9, 2, 2) and features.min() == 0
    pooled = features.mean((2, 3))
    torch.testing.assert_close(model(x), F.linear(pooled, model.classifier.weight, model.classifier.bias))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and (model.classifier.bias == 0).all()
    assert model.state_dict().keys() == DenseNet(depth=10).state_dict().keys()
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_dropout_follows_every_convolution_but_the_first(monkeypatch, bottleneck):
    """One call for each convolution but the stem, with that convolution's output, and only while training."""
    model, calls, outputs = DenseNet(depth=10, growth_rate=4, drop_rate=0.2, bottleneck=bottleneck), [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    real = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append((x, p, training)) or real(x, p, training))
    model(torch.randn(2, 3, 8, 8))
    assert [id(x) for x, _, _ in calls] == [id(x) for x in outputs[1:]]
    assert {call[1:] for call in calls} == {(0.2, True)}
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["densenet121", "densenet161"])
def test_equals_torchvision_in_float64(name):
    """Outputs, gradients and running statistics, with the same random weights, in training and evaluation."""
    import torchvision

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7).double()
    ours = DenseNet(**ARCHITECTURES[name] | {"num_classes": 7}).double()
    ours.load_torchvision(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for output in outputs:
        F.cross_entropy(output, torch.tensor([3, 5])).backward()
    expected = {key: value.grad for key, value in theirs.named_parameters()}
    for value in ours.parameters():
        value.data.copy_(value.grad)
    gradients = ours.torchvision_state_dict()
    assert max((gradients[key] - value).abs().max() for key, value in expected.items()) < 1e-10

    statistics = theirs.state_dict()
    for key, value in ours.torchvision_state_dict().items():
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(value, statistics[key], rtol=1e-12, atol=1e-12)
    ours.load_torchvision(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-12)


def test_torchvision_names_go_both_ways():
    import torchvision

    ours, theirs = densenet121(), torchvision.models.densenet121()
    assert ours.classifier.out_features == 1000
    assert theirs.load_state_dict(ours.torchvision_state_dict()).missing_keys == []
    # Weights published with early releases spell norm1 as norm.1, and have no num_batches_tracked.
    early = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in theirs.state_dict().items()
        if "tracked" not in key
    }
    for value in ours.parameters():
        value.data.zero_()
    ours.load_torchvision({f"module.{key}": value for key, value in early.items()})  # as trained in parallel
    assert torch.equal(ours.blocks[2].layers[7].conv2.weight, theirs.features.denseblock3.denselayer8.conv2.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        DenseNet(**ARCHITECTURES["densenet161"]).load_torchvision(early)
