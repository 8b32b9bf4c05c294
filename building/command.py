"""The command `build_ext`: builds the best kernels that can be built here, and records what came of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

from building.errors import NotPossible
from building.host_compiler import name_in_one_word
from building.kernels import (
    EXTENSION,
    Plan,
    choose_architectures,
    distinct_objects,
    make_extension,
    plan,
    switched_on,
)
from building.record import LOG, copied_output, first_complaint, write_record

_FAILURES = (BaseError, NotPossible, RuntimeError, OSError, subprocess.CalledProcessError)
_OPTIONS = ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "force", "compiler")
_LOAD = """import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
module_from_spec(spec_from_file_location(*sys.argv[1:]))
"""


def say(line: str) -> None:
    """Prints one line to the build's output."""
    print(f"cdm_fast: {line}", file=sys.stderr, flush=True)


class BuildKernels(build_ext):
    """Tries CUDA and C++ kernels, then C++ kernels alone, and leaves pure Python if both fail."""

    def run(self) -> None:
        self.left_out: dict[str, str] = {}  # "cpp" or "cuda" -> why it was not built
        self.output: list[bytes] = []  # what the compilers said, kept if any attempt fails
        self.record: dict[str, Any] = {"built": [], "left_out": self.left_out}
        failed = False
        try:
            chosen = plan()
        except NotPossible as error:
            self.left_out |= {"cpp": str(error), "cuda": str(error)}
        else:
            failed = self._build_best(chosen)
        self._finish(failed)

    def _build_best(self, chosen: Plan) -> bool:
        """Builds the best variant that can be built; whether any attempt failed."""
        self.record |= {"torch": chosen.torch.__version__, "torch_cuda": chosen.torch.version.cuda}
        name_in_one_word(chosen.cpp_extension, Path(self.build_temp))
        variants = [False]
        if chosen.toolkit is not None:
            variants = [True, False]
            home, release, found_by = chosen.toolkit
            self.record["toolkit"] = f"CUDA {release} in {home}, found by {found_by}"
            self.record["architectures"] = choose_architectures(chosen.torch.cuda.is_available())
            say(f"CUDA kernels for {self.record['architectures']}, with {self.record['toolkit']}")
        else:
            self.left_out["cuda"] = str(chosen.left_out)
        for attempt, cuda in enumerate(variants):
            error = self._attempt(chosen, cuda)
            if error is None:
                self.record["built"] = ["cpp", "cuda"] if cuda else ["cpp"]
                return attempt > 0
            self.left_out["cuda" if cuda else "cpp"] = f"building failed ({error})"
        return True

    def _attempt(self, chosen: Plan, cuda: bool) -> str | None:
        """Builds one variant and loads it; what went wrong, or None."""
        begin = len(self.output)
        say(f"building {'CUDA and C++' if cuda else 'C++'} kernels")
        try:
            with copied_output(self.output):
                self._build(chosen, cuda)
                self._check_that_it_loads()
        except _FAILURES as error:
            said = b"".join(self.output[begin:]).decode(errors="replace")
            return first_complaint(said) or " ".join(str(error).split())
        return None

    def _build(self, chosen: Plan, cuda: bool) -> None:
        self.distribution.ext_modules = [make_extension(chosen, cuda)]
        command = _with_distinct_objects(chosen.cpp_extension.BuildExtension)(self.distribution)
        for option in _OPTIONS:
            setattr(command, option, getattr(self, option))
        command.ensure_finalized()
        command.run()

    def _check_that_it_loads(self) -> None:
        """A shared library links with symbols missing: only loading it tells."""
        # Without `site`: pip's own sitecustomize would hide the torch of the environment again.
        start = f"import sys; sys.path[:] = {[folder for folder in sys.path if folder]!r}\n"
        command = [sys.executable, "-I", "-S", "-c", start + _LOAD, EXTENSION, str(self._product())]
        subprocess.run(command, check=True)

    def _product(self) -> Path:
        return Path(self.get_ext_fullpath(EXTENSION))

    def _finish(self, failed: bool) -> None:
        """Writes the record; removes a library that is not of this build; stops if kernels were demanded."""
        if not self.record["built"]:
            self._product().unlink(missing_ok=True)
        log = b"".join(self.output).decode(errors="replace") if failed else None
        self.record["log"] = LOG if failed else None
        write_record(self._product().parent, self.record, log)
        for kind, reason in self.left_out.items():
            say(f"{kind} kernels left out: {reason}")
        if switched_on("CDM_FAST_REQUIRE_EXT") and (failed or not self.record["built"]):
            reasons = "; ".join(dict.fromkeys(self.left_out.values()))
            raise SystemExit(f"cdm_fast: CDM_FAST_REQUIRE_EXT is set, but {reasons}")


def _with_distinct_objects(build_extension: type) -> type:
    """torch's BuildExtension, except that X.cpp and X.cu get object files of their own."""

    class Command(build_extension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            self.compiler.object_filenames = distinct_objects(self.compiler.object_filenames)
            super().build_extensions()

    return Command


def setup_arguments() -> dict[str, Any]:
    """Arguments of setup() that describe the extension; what is really built is decided by the command."""
    if not switched_on("CDM_FAST_NO_EXT"):
        return {"ext_modules": [Extension(EXTENSION, [])], "cmdclass": {"build_ext": BuildKernels}}
    if switched_on("CDM_FAST_REQUIRE_EXT"):
        raise SystemExit("cdm_fast: CDM_FAST_REQUIRE_EXT and CDM_FAST_NO_EXT are both set")
    say("CDM_FAST_NO_EXT is set: installing pure Python")
    return {}
