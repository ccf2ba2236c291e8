"""Only what pyproject.toml cannot say: `data/demo/` (and `data/demo_experts/`) travels in the package, as
`llmbrain.datasets.demo_files`; and the page of the report."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

# The demo brain, and the one that is a mixture of experts.
FOLDERS = {
    f"llmbrain.datasets.{name}_files": f"data/{name}"
    for name in ("demo", "demo_experts")
    if Path(__file__).with_name("data").joinpath(name, "model.safetensors").is_file()
}

setup(
    packages=[*find_namespace_packages(include=["llmbrain*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        **{name: ["*.json", "*.jsonl", "*.safetensors", "*.md"] for name in FOLDERS},
        "llmbrain.page": ["static/*", "templates/*"],
        "llmbrain.reporting": ["templates/*"],
    },
)
