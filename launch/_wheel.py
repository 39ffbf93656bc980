"""Build hook: the shipped YAML and launch files go into the wheel as `posttrain/_shipped`, and into the sdist as they lie.

Named in pyproject.toml (`tool.setuptools.cmdclass`). An editable install copies nothing, since `posttrain.shipped` then
reads the repository itself.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

SHIPPED = ("configs/**/*", "launch/accelerate/*.yaml", "launch/slurm.sbatch", "launch/Dockerfile", "constraints.txt")
SOURCE_ONLY = ("launch/*.sh", "launch/_wheel.py")


def _files(*patterns: str) -> list[str]:
    found = {path for pattern in patterns for path in Path().glob(pattern) if path.is_file() and "__pycache__" not in path.parts}
    return sorted(path.as_posix() for path in found)


class BuildWithShipped(build_py):
    """`build_py` that also copies the files of `SHIPPED`."""

    def _copies(self) -> dict[str, str]:
        """Target below the build folder -> file of the repository."""
        root = Path(self.build_lib) / "posttrain" / "_shipped"
        return {str(root / name): name for name in _files(*SHIPPED)}

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for target, source in self._copies().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + list(self._copies())

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **self._copies()}

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + _files(*SHIPPED, *SOURCE_ONLY)
