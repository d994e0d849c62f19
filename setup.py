"""Builds fastnn._C by running CMake; every compiler flag is in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        source = Path(__file__).parent.resolve()
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        library = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": library,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTNN_VERSION": self.distribution.get_version(),
            "FASTNN_CUDA": os.environ.get("FASTNN_CUDA", "AUTO"),
        }
        # Named anew each time: pip's build environments come and go, and the cache would keep a ninja that is gone.
        options["CMAKE_MAKE_PROGRAM"] = shutil.which("ninja")
        configure = ["cmake", "-S", source, "-B", build, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def copy_extensions_to_source(self) -> None:
        """What an editable installation does with the module, and here with all that CMake put beside it."""
        super().copy_extensions_to_source()
        for path in Path(self.build_lib, "fastnn").iterdir():
            if path.is_file():  # the emulator's module and tests, the report of CUDA's compiler
                self.copy_file(str(path), str(Path("fastnn", path.name)))


setup(ext_modules=[Extension("fastnn._C", sources=[])], cmdclass={"build_ext": BuildWithCMake})
