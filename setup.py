"""Packaging of msqkd; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "msqkd" / "version.py").read_text()).group(1)

MINDCV = ["mindcv>=0.3"]
ONNX = ["onnx>=1.15", "onnxruntime>=1.17"]
TEST = [
    *MINDCV,
    *ONNX,
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
]
LINT = ["ruff==0.17.5", "mypy==2.4.1", "types-PyYAML"]  # mypy needs Python 3.10 or newer
RECIPES = sorted(str(file.relative_to(HERE)) for file in (HERE / "recipes").glob("*.yaml"))

setup(
    name="msqkd",
    version=VERSION,
    description="Quantisation-aware training, distillation, calibration and INT8 export for MindSpore networks",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["msqkd", "msqkd.*"]),
    package_data={"msqkd": ["py.typed", "analysis/*.j2"]},
    python_requires=">=3.9",
    install_requires=[
        "mindspore>=2.7",
        "flatbuffers>=23.5",
        "jinja2>=3.1",
        "matplotlib>=3.7",
        "numpy>=1.25,<2",  # MindSpore 2.10 fails on its first eager operation with numpy 2
        "protobuf>=3.20",
        "pillow>=9.1",
        "pydantic>=2.5",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "typer>=0.12",
    ],
    extras_require={"mindcv": MINDCV, "onnx": ONNX, "test": TEST, "lint": LINT},
    data_files=[("share/msqkd/recipes", RECIPES)],
    entry_points={"console_scripts": ["msqkd=msqkd.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
