"""Files that PyTorch itself writes, of timm's, Hugging Face's and smp's models with random weights: the same outputs.

Only with `--peers`, where `pip install ".[test,peers]"` was said: `pytest -n 0 -m peers --peers tests/pretrained`.
"""

import re

import jax
import numpy as np
import pytest

from jax_densevit.experiment import make_ready
from jax_densevit.export import export_weights
from jax_densevit.models import create_model
from jax_densevit.pretrained import convert, read

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

X = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
SIZES = {"hidden_size": 24, "num_layers": 4, "num_heads": 2, "mlp_size": 96, "image_size": 64}
TIMM = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2, "mlp_ratio": 4}
HF = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}


@pytest.fixture
def torch():
    import torch

    torch.manual_seed(0)
    return torch


def randomised(torch, module):
    """Every weight and statistic of noise: nothing is left at a zero or one that would hide a mistake."""
    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            near = 1.0 if re.search(r"(norm|ln|bn)\w*\.weight$|running_var$|\d\.1\.weight$", name) else 0.0
            state[name] = near + torch.empty_like(value).uniform_(-0.2, 0.2)
    module.load_state_dict(state)
    return module.eval()


def theirs(torch, module, x=X):
    with torch.no_grad():
        return module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))


def ours(tensors, source, model, x=X, **options):
    """(our output, variables)."""
    variables = convert(tensors, source, model, **options)
    return jax.jit(model.apply)(variables, x), variables


def close(got, want):
    want = want.detach().numpy()
    assert np.abs(want).max() > 0.1  # an output that is zero says nothing
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_timm_vit(torch, tmp_path, legacy):
    from timm.models.vision_transformer import VisionTransformer

    peer = randomised(torch, VisionTransformer(**TIMM, num_classes=5))
    torch.save(peer.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    tensors = read(tmp_path / "a.pth")
    for name, value in peer.state_dict().items():
        np.testing.assert_array_equal(tensors[name], value.numpy())
    model = create_model("vit", **SIZES, num_classes=5)
    output, variables = ours(tensors, "timm_vit", model)
    close(output.logits, theirs(torch, peer))

    # And back: timm loads what we write, strictly.
    loaded = make_ready(model, variables, None, None, None, 0)
    export_weights(loaded, "timm_vit", tmp_path / "b.safetensors")
    from safetensors.torch import load_file

    again = VisionTransformer(**TIMM, num_classes=5).eval()
    again.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert torch.equal(theirs(torch, again), theirs(torch, peer))


@pytest.mark.parametrize(("pool", "fc_norm"), [("mean", True), ("gap", False)])
def test_timm_vit_of_mean_tokens(torch, tmp_path, pool, fc_norm):
    from timm.models.vision_transformer import VisionTransformer

    peer = randomised(torch, VisionTransformer(**TIMM, num_classes=5, global_pool="avg", fc_norm=fc_norm))
    torch.save(peer.state_dict(), tmp_path / "a.pth")
    output, _ = ours(read(tmp_path / "a.pth"), "timm_vit", create_model("vit", **SIZES, num_classes=5, pool=pool))
    close(output.logits, theirs(torch, peer))


def test_position_tables_like_timm(torch, tmp_path):
    """A file of 48 pixels for a model of 64: the rule that timm itself resizes by."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    small = randomised(torch, VisionTransformer(**{**TIMM, "img_size": 48}, num_classes=5))
    torch.save({"state_dict": small.state_dict()}, tmp_path / "a.pth")
    peer = VisionTransformer(**TIMM, num_classes=5).eval()
    peer.load_state_dict(checkpoint_filter_fn(small.state_dict(), peer, interpolation="bicubic", antialias=True))
    output, _ = ours(read(tmp_path / "a.pth"), "timm_vit", create_model("vit", **SIZES, num_classes=5))
    np.testing.assert_allclose(output.logits, theirs(torch, peer).numpy(), rtol=1e-4, atol=1e-4)


def test_deit_distilled(torch, tmp_path):
    from timm.models.deit import VisionTransformerDistilled

    peer = randomised(torch, VisionTransformerDistilled(**TIMM, num_classes=5))
    torch.save({"model": peer.state_dict()}, tmp_path / "a.pth")
    model = create_model("vit", **SIZES, num_classes=5, distilled=True)
    output, _ = ours(read(tmp_path / "a.pth"), "deit", model)
    close(output.logits, theirs(torch, peer))


def test_hugging_face_vit_and_deit(torch, tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

    for kind, config, distilled in (
        (ViTForImageClassification, ViTConfig(**HF, num_labels=5), False),
        (DeiTForImageClassificationWithTeacher, DeiTConfig(**HF, num_labels=5), True),
    ):
        peer = randomised(torch, kind(config))
        peer.save_pretrained(tmp_path / kind.__name__)
        model = create_model("vit", **SIZES, num_classes=5, distilled=distilled, norm_epsilon=1e-12)
        output, variables = ours(read(tmp_path / kind.__name__ / "model.safetensors"), "hf_vit", model)
        close(output.logits, theirs(torch, peer).logits)
        # And back.
        export_weights(make_ready(model, variables, None, None, None, 0), "hf_vit", tmp_path / "b.safetensors")
        written = read(tmp_path / "b.safetensors")
        prefix = "deit." if distilled else "vit."
        for name, array in read(tmp_path / kind.__name__ / "model.safetensors").items():
            np.testing.assert_array_equal(written[name.removeprefix(prefix)], array)


@pytest.mark.parametrize("head", ["segmentation", "depth"])
def test_hugging_face_dpt(torch, tmp_path, head):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTForSemanticSegmentation

    config = DPTConfig(
        **HF,
        num_labels=5,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 6, 8, 10],
        fusion_hidden_size=8,
        use_batch_norm_in_fusion_residual=head == "segmentation",
        head_in_index=-1,
    )
    kind = DPTForSemanticSegmentation if head == "segmentation" else DPTForDepthEstimation
    peer = randomised(torch, kind(config))
    peer.save_pretrained(tmp_path / "dpt")
    options = {**SIZES, "reassemble": (4, 6, 8, 10), "features": 8, "norm_epsilon": 1e-12, "taps": (1, 2, 3, 4)}
    if head == "segmentation":
        model = create_model("dpt", **options, num_classes=5)
    else:
        model = create_model("dpt_depth", **options, num_classes=1)
    output, _ = ours(read(tmp_path / "dpt" / "model.safetensors"), "hf_dpt", model)
    result = theirs(torch, peer)
    if head == "segmentation":
        close(np.moveaxis(np.asarray(output.logits), -1, 1), result.logits)
    else:
        close(output.logits[..., 0], result.predicted_depth)


# smp's names of DPT's parts, and the authors'.
SMP = (
    (r"^encoder\.model\.", "pretrained.model."),
    (
        r"^decoder\.projection_blocks\.(\d)\.project\.",
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.0.project.",
    ),
    (
        r"^decoder\.reassemble_blocks\.(\d)\.project_to_out_channel",
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.3",
    ),
    (r"^decoder\.reassemble_blocks\.(\d)\.upsample", lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.4"),
    (
        r"^decoder\.reassemble_blocks\.(\d)\.project_to_feature_dim",
        lambda m: f"scratch.layer{int(m[1]) + 1}_rn",
    ),
    (r"^decoder\.fusion_blocks\.(\d)\.project", lambda m: f"scratch.refinenet{4 - int(m[1])}.out_conv"),
    (
        r"^decoder\.fusion_blocks\.(\d)\.residual_conv_block(\d)",
        lambda m: f"scratch.refinenet{4 - int(m[1])}.resConfUnit{m[2]}",
    ),
    (r"\.conv_(\d)\.", r".conv\1."),
    (r"\.batch_norm_(\d)\.", r".bn\1."),
    (r"^segmentation_head\.head", "scratch.output_conv"),
)


def test_segmentation_models_pytorch_dpt(torch, tmp_path):
    import segmentation_models_pytorch as smp

    sizes = {"img_size": 64, "embed_dim": 24, "num_heads": 2}  # and the twelve blocks that it has
    peer = smp.DPT(
        encoder_name="tu-vit_tiny_patch16_224",
        encoder_weights=None,
        encoder_output_indices=[2, 5, 8, 11],
        decoder_intermediate_channels=(4, 6, 8, 10),
        decoder_fusion_channels=8,
        classes=5,
        **sizes,
    )
    randomised(torch, peer)
    # The authors' deepest fusion has no use for its first unit; smp's has: here it adds nothing.
    unit = peer.decoder.fusion_blocks[0].residual_conv_block1
    with torch.no_grad():
        unit.batch_norm_2.weight.zero_()
        unit.batch_norm_2.bias.zero_()
    torch.save(peer.state_dict(), tmp_path / "a.pth")
    named = {}
    for name, array in read(tmp_path / "a.pth").items():
        for pattern, new in SMP:
            name = re.sub(pattern, new, name)
        named[name] = array
    options = {**SIZES, "num_layers": 12, "reassemble": (4, 6, 8, 10), "features": 8, "auxiliary": False}
    output, _ = ours(named, "dpt", create_model("dpt", **options, num_classes=5))
    close(np.moveaxis(np.asarray(output.logits), -1, 1), theirs(torch, peer))
