"""Only what pyproject.toml cannot say: `data/demo/` travels in the package, as `llmbrain.datasets.demo_files`;
and the page of the report."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["llmbrain*"]), "llmbrain.datasets.demo_files"],
    package_dir={"llmbrain.datasets.demo_files": "data/demo"},
    package_data={
        "llmbrain.datasets.demo_files": ["*.json", "*.jsonl", "*.safetensors", "*.md"],
        "llmbrain.page": ["static/*", "templates/*"],
        "llmbrain.reporting": ["templates/*"],
    },
)
