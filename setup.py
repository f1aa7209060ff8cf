"""What pyproject.toml cannot declare: the C++ extension, one build per CPU capability.

Each build is a shared library of its own, of the same sources; `dfm_fast._library` loads the best
one that the CPU runs. DFM_FAST_NO_EXT=1 installs pure Python. DFM_FAST_BUILDS names the builds that
are wanted, such as _C_avx512; with DFM_FAST_SANITIZE=1 they look for errors as they run. Builds for
the CPU keep to Python's limited API: a wheel of them serves every Python from 3.11 on, with the
torch it was built against.
"""

import os
import platform
from pathlib import Path

from setuptools import find_packages, setup

FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
# Flags follow torch's own definition of the capabilities AVX2 and AVX512.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mprefer-vector-width=512"]
# See `make sanitize`. -O3 would take several times as long; vptr asks for torch's own types.
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZED += ["-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
# Without it at::parallel_for is serial; torch has loaded its own libgomp by then.
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []
BUILDS = {"_C": []}
if platform.machine() in ("x86_64", "AMD64"):
    BUILDS |= {"_C_avx2": AVX2, "_C_avx512": AVX512}


def extensions():
    """(ext_modules, cmdclass); empty where DFM_FAST_NO_EXT=1."""
    if os.environ.get("DFM_FAST_NO_EXT") == "1":
        return [], {}
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """One object directory per extension: the builds share their sources."""

        def build_extension(self, ext):
            base, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            super().build_extension(ext)
            self.build_temp = base
            built = Path(self.get_ext_fullpath(ext.name))
            for older in built.parent.glob(f"{built.name.split('.')[0]}.cpython-*.so"):
                if older != built:  # Python would find it first
                    older.unlink()

    def cpp(name, flags):
        sanitized = SANITIZED if os.environ.get("DFM_FAST_SANITIZE") == "1" else []
        args = [*FLAGS, *flags, *OPENMP, *sanitized]
        sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
        return CppExtension(
            f"dfm_fast.{name}",
            sources,
            depends=sorted(str(p) for p in Path("csrc/cpu").glob("*.h")),
            extra_compile_args={"cxx": args},
            extra_link_args=[*OPENMP, *(flag for flag in sanitized if "=address" in flag)],
            py_limited_api=True,
        )

    only = os.environ.get("DFM_FAST_BUILDS", "").split(",")
    modules = [cpp(name, flags) for name, flags in BUILDS.items()]
    sources = sorted(str(p) for p in Path("csrc/cuda").glob("*.c*"))
    import torch

    if torch.version.cuda and CUDA_HOME and sources:
        args = {"cxx": ["-O3"], "nvcc": ["-O3", "-lineinfo"]}
        headers = sorted(str(p) for p in Path("csrc/cuda").glob("*.h"))
        modules.append(
            CUDAExtension("dfm_fast._C_cuda", sources, depends=headers, extra_compile_args=args)
        )
    modules = [m for m in modules if only == [""] or m.name.removeprefix("dfm_fast.") in only]
    return modules, {"build_ext": Build}


modules, commands = extensions()
limited = bool(modules) and all(module.py_limited_api for module in modules)
setup(
    package_dir={"dfm_fast.kernels": "kernels"},
    packages=[*find_packages(include=["dfm_fast", "dfm_fast.*"]), "dfm_fast.kernels"],
    ext_modules=modules,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
