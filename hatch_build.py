"""Build hook of hatchling: compile the native kernels where that works; an install never fails for want of them."""

import runpy
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).resolve().parent / "moestro" / "ops" / "native"


class NativeKernels(BuildHookInterface):
    """Puts `kernels.so` into a wheel, or beside its sources for an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict) -> None:
        """Compile; a wheel with the library is one for this platform and every Python."""
        try:
            built = runpy.run_path(str(FOLDER / "build.py"), run_name="moestro_native_build")["main"]() == 0
        except Exception as error:  # whatever it is, the package works without
            self.app.display_warning(f"native kernels: {error!r}")
            built = False
        if not built:
            self.app.display_warning("moestro is installed without native kernels")
            return
        build_data["artifacts"].append("moestro/ops/native/kernels.so")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
