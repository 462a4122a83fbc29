import pytest
import torch

from sifar import UserError
from sifar.config import ARCHS
from sifar.training.models import WIDTHS, get_model


def params(model):
    return sum(o.numel() for o in model.parameters())


def test_parameter_counts():
    assert params(get_model("resnet18", 100)) == 11_220_132
    assert params(get_model("resnet18", 10)) == 11_173_962
    assert params(get_model("resnet34", 100)) == 21_328_292
    assert params(get_model("sprintnet", 100)) == 7_369_112
    assert set(ARCHS) == {*WIDTHS, "sprintnet"}


@pytest.mark.parametrize("arch", ["resnet8", "resnet10", "resnet18-late", "sprintnet"])
@pytest.mark.parametrize("sz", [16, 32, 48])
def test_any_size_gives_one_row_of_logits_an_image(arch, sz):
    assert get_model(arch, 7)(torch.randn(2, 3, sz, sz)).shape == (2, 7)


def test_the_stem_keeps_the_full_size():
    model = get_model("resnet10", 10)
    x = model.stem(torch.randn(1, 3, 32, 32))
    assert x.shape == (1, 64, 32, 32) and model.blocks(x).shape == (1, 512, 4, 4)


def test_a_late_head_sees_the_quarters_of_the_last_two_stages_of_the_same_model():
    plain, late = get_model("resnet18", 10).eval(), get_model("resnet18-late", 10).eval()
    fits = {k: v for k, v in plain.state_dict().items() if not k.startswith("head")}
    assert set(late.load_state_dict(fits, strict=False).missing_keys) == {"head.2.weight", "head.2.bias"}
    x = torch.randn(1, 3, 32, 32)
    features = late.forward_features(x)
    assert features.shape == (1, 768, 8, 8) and late.num_features == 768
    assert torch.allclose(features[:, :512, ::2, ::2], plain.forward_features(x), atol=1e-5)
    turned = features.flip(3)
    assert not torch.allclose(late.forward_head(turned), late.forward_head(features), atol=1e-3)


def test_whitened_patches_vary_alike_in_every_direction():
    whitening = get_model("sprintnet", 10).whitening
    x = torch.randn(64, 3, 1, 1) + 0.3 * torch.randn(64, 3, 16, 16)  # pixels beside each other are much alike
    whitening.fit(x)
    out = whitening(x)[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(out @ out.T / out.shape[1], torch.eye(12), atol=0.02)
    assert torch.equal(whitening(x)[:, 12:], -whitening(x)[:, :12])
    assert not any("filters" in name for name, _ in whitening.named_parameters()), "they are not trained"


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",
        *(
            pytest.param(o, marks=pytest.mark.slow)
            for o in ("resnet18", "densenet121", "vit_tiny_patch16_224")
        ),
    ],
)
def test_timm_models_fit_small_images(name):
    model = get_model(f"timm:{name}", 10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    strides = [
        m.stride for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (7, 7)
    ]
    assert not strides, "no 7x7 stem is left"


def test_timm_resnet18_is_ours_in_all_but_its_names():
    model = get_model("timm:resnet18", 100)
    assert params(model) == 11_220_132
    assert model.layer1(
        model.maxpool(model.act1(model.bn1(model.conv1(torch.randn(1, 3, 32, 32)))))
    ).shape == (1, 64, 32, 32)


@pytest.mark.parametrize(
    "name, words",
    [
        ("timm:resnet-18", "did you mean"),
        ("resnet-18", "did you mean resnet18"),
        ("timm:inception_v4", "cannot take images of 32x32"),
    ],
)
def test_an_unknown_or_unfit_model_is_one_line(name, words):
    with pytest.raises(UserError, match=words) as e:
        get_model(name, 10)
    assert "\n" not in e.value.text


def test_a_model_has_to_take_all_sizes_of_a_training():
    name = "timm:vit_tiny_patch16_224"
    assert get_model(name, 10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(UserError, match="cannot take images of 16x16, 32x32 pixels"):
        get_model(name, 10, (32, 16))


def test_sprintnet_says_which_images_are_too_small_for_it():
    assert get_model("sprintnet", 5, (32, 16)).eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(UserError, match="16 pixels or more, not 12"):
        get_model("sprintnet", 5, (32, 12))


@pytest.mark.parametrize("h, w", [(15, 15), (16, 16), (7, 15), (16, 15)])
def test_what_a_pool_of_sprintnet_leaves_out_is_not_computed_and_makes_no_difference(h, w):
    torch.manual_seed(0)
    block = get_model("sprintnet", 5).double().blocks[1]
    x = torch.randn(2, 64, h, w, dtype=torch.float64)
    whole = torch.nn.functional.conv2d(x, block.conv1.weight, padding=1)
    odd = h % 2 and w % 2
    assert whole.shape[2:] == (h, w) and block.conv1(x).shape[2:] == (h - odd, w - odd)
    torch.testing.assert_close(block.pool(block.conv1(x)), block.pool(whole))


def test_the_gradients_of_a_sprintnet_are_in_memory_as_its_images_are():
    model, seen = get_model("sprintnet", 5).to(memory_format=torch.channels_last), []
    model.blocks.register_full_backward_hook(lambda layer, into, out: seen.append(out[0]))
    model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()
    assert seen[0].shape == (2, 512, 3, 3) and seen[0].is_contiguous(memory_format=torch.channels_last)
