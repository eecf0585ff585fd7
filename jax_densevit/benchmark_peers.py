"""The same architectures in PyTorch, for `python -m jax_densevit.benchmark --peers`: needs the extra `peers`.

A peer is counted as the same architecture only if its number of parameters is ours. ViT: timm and transformers. DPT:
transformers. What no package has is written out in PyTorch layers in `peers/`: Uformer, the axial transformer, and the
U-Net, for segmentation-models-pytorch's Unet decodes a classification network; on a VGG-11 encoder it is timed as
another architecture.
"""

import importlib
import os
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from jax_densevit.errors import UserError
from jax_densevit.models.counts import count_parameters
from jax_densevit.timing import Contender, Job, build_model

PACKAGES = {"torch": "torch", "timm": "timm", "segmentation_models_pytorch": "segmentation-models-pytorch"}
_DTYPES = ("float32", "bfloat16")
WRITTEN_OUT = "PyTorch, written out"
# Whose maps have channels last, PyTorch's own advice for convolutions on CPUs: U-Net is up to a third faster so.
_CHANNELS_LAST = ("unet",)


def check_installed(platform: str, dtype: str) -> None:
    """Imports the peers; :class:`UserError` when they are missing or cannot run where JAX runs.

    Args:
      platform: JAX's backend, "cpu" or "gpu".
      dtype: type of the computation.
    """
    if dtype not in _DTYPES:
        raise UserError(f"--peers can compute in {' or '.join(_DTYPES)}, not in {dtype}.")
    try:
        import torch

        _make_torchvision_importable(torch)
        for module in PACKAGES:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--peers needs {error.name or 'PyTorch and its friends'}, which is not installed; "
            "pip install 'jax_densevit[peers]' brings it."
        ) from error
    if platform == "gpu" and not torch.cuda.is_available():
        raise UserError("JAX computes on the GPU and the installed PyTorch cannot; install its CUDA build for --peers.")
    if platform not in ("cpu", "gpu"):
        raise UserError(f"--peers compares on CPUs and NVIDIA GPUs, and JAX runs on {platform!r}.")
    if platform == "cpu" and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def _make_torchvision_importable(torch) -> None:
    """Lets a torchvision built for CUDA be imported beside a CPU build of PyTorch.

    That pair is what pip resolves to on machines without a GPU. Its import fails because its compiled operators are
    absent; nothing timed here calls them, so their names alone are enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _make_torchvision_importable.library = library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def versions() -> dict[str, str]:
    """Versions of the installed peers."""
    found = {}
    for package in (*PACKAGES.values(), "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def contenders(job: Job, batch: int, train: bool, dtype: str) -> tuple[list[Contender], str]:
    """Every peer of a job, ready to be timed, and a sentence for the report ("" when there is nothing to say)."""
    builders = {"vit": _vits, "unet": _unets, "dpt": _dpts, "uformer": _uformers, "axial": _axials}
    peers = builders[job.name](job) if job.name in builders else []
    if not peers:
        return [], f"{job}: there is no PyTorch form of it to time; it was timed alone."
    ours = count_parameters(build_model(job, {}), job.size)
    found, notes = [], []
    for label, module in peers:
        parameters = sum(p.numel() for p in module.parameters())
        same = parameters == ours
        if not same:
            notes.append(f"* {label} has {parameters:,} parameters and ours {ours:,}: not the same architecture.")
        for contender in _time_torch(label, module, job, batch, train, dtype):
            contender.same = same
            contender.facts["parameters"] = parameters
            found.append(contender)
    return found, "\n".join(notes)


def _time_torch(label: str, module: Any, job: Job, batch: int, train: bool, dtype: str) -> list[Contender]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and _on_gpu() else "cpu")
    module = module.to(device)
    images = torch.randn(batch, 3, *job.size, device=device)
    if job.name in _CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
        if device.type == "cpu":
            module = module.to(memory_format=torch.channels_last)
    half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def forward():
        module.eval()
        with torch.inference_mode(), half:
            return _heads(module(images))[0]

    found = [Contender(label, "forward", forward, wait)]
    if train:

        def cross_entropy(logits):
            target = torch.zeros((len(logits), *logits.shape[2:]), dtype=torch.long, device=device)
            return torch.nn.functional.cross_entropy(logits.float(), target)

        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

        def step():
            module.train()
            optimizer.zero_grad(set_to_none=True)
            with half:
                heads = _heads(module(images))
            # As ours: every head counts, against class 0 everywhere.
            sum(map(cross_entropy, heads)).backward()
            optimizer.step()

        found.append(Contender(label, "train step", step, wait))
    return found


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _heads(output: Any) -> Sequence[Any]:
    """Logits of every head that a module answers with."""
    output = getattr(output, "logits", output)
    return output if isinstance(output, (list, tuple)) else [output]


def _vits(job: Job) -> list[tuple[str, Any]]:
    import timm

    model = build_model(job, {})
    sizes = {
        "patch_size": model.patch_size,
        "embed_dim": model.hidden_size,
        "depth": model.num_layers,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_size / model.hidden_size,
        "img_size": job.size,
        "num_classes": model.num_classes,
    }
    transformer = timm.models.vision_transformer.VisionTransformer
    if model.distilled:
        transformer = timm.models.deit.VisionTransformerDistilled
    found = [(f"timm {metadata.version('timm')}", transformer(**sizes))]
    if job.size[0] == job.size[1] and not model.distilled and _installed("transformers"):
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            intermediate_size=model.mlp_size,
            image_size=job.size[0],
            patch_size=model.patch_size,
            num_labels=model.num_classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        found.append((f"transformers {metadata.version('transformers')}", ViTForImageClassification(config)))
    return found


def _unets(job: Job) -> list[tuple[str, Any]]:
    import segmentation_models_pytorch as smp

    from jax_densevit.peers.unet import UNet

    model = build_model(job, {})
    found = [(WRITTEN_OUT, UNet(model))]
    if job.size[0] % 32 == 0 and job.size[1] % 32 == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = smp.Unet("vgg11_bn", encoder_weights=None, classes=model.num_classes)
        found.append((f"smp {metadata.version('segmentation-models-pytorch')} Unet, VGG-11", other))
    return found


def _dpts(job: Job) -> list[tuple[str, Any]]:
    model = build_model(job, {})
    if model.blocks or job.size[0] != job.size[1] or not _installed("transformers"):
        return []
    from jax_densevit.peers.dpt import Dpt

    return [(f"transformers {metadata.version('transformers')}", Dpt(model))]


def _uformers(job: Job) -> list[tuple[str, Any]]:
    model = build_model(job, {})
    if model.clone(padding="original").padded(job.size) != job.size:
        return []
    from jax_densevit.peers.uformer import Uformer

    return [(WRITTEN_OUT, Uformer(model))]


def _axials(job: Job) -> list[tuple[str, Any]]:
    model = build_model(job, {})
    if model.positions:
        return []
    from jax_densevit.peers.axial import Axial

    return [(WRITTEN_OUT, Axial(model))]


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
