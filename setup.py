"""Builds fastnn._C by running CMake; every compiler flag is in CMakeLists.txt."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext


class BuildAnew(build):
    """Nothing that an earlier build left goes into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        source = Path(__file__).parent.resolve()
        objects = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        library = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": library,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTNN_VERSION": self.distribution.get_version(),
            "FASTNN_CUDA": os.environ.get("FASTNN_CUDA", "AUTO"),
        }
        # Objects stay, but no option of an earlier build, nor the ninja of one of pip's environments, which is gone.
        (objects / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-S", source, "-B", objects, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", objects], check=True)

    def copy_extensions_to_source(self) -> None:
        """What an editable installation does with the module, and here with all that CMake put beside it."""
        super().copy_extensions_to_source()
        for path in Path(self.build_lib, "fastnn").iterdir():
            # the emulator's module and tests, the report of CUDA's compiler; the package's own files came from there
            if path.is_file() and path.suffix not in (".py", ".pyi", ".typed"):
                self.copy_file(str(path), str(Path("fastnn", path.name)))


setup(ext_modules=[Extension("fastnn._C", sources=[])], cmdclass={"build": BuildAnew, "build_ext": BuildWithCMake})
