"""The decisions of the kernels' build: torch, toolkit, compiler, and the result when something fails."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

from building import backend, command, host_compiler, kernels, target, toolkit
from building.errors import NotPossible
from building.record import copied_output, first_complaint, write_record

SWITCHES = (
    *("CUDA_HOME", "CUDA_PATH", "CXX", "CC", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST"),
    *("CDM_FAST_NO_EXT", "CDM_FAST_FORCE_CPU", "CDM_FAST_REQUIRE_EXT"),
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    for name in SWITCHES:
        monkeypatch.setenv(name, "")  # so that what a test sets through os.environ is undone, too
        monkeypatch.delenv(name)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def nvcc_at(path, release="13.0", top=None):
    """An nvcc that tells its release, and its folder if it knows one."""
    told = f"echo '#$ TOP={top}' >&2" if top else "exit 1"
    return script(
        path, f"[ $1 = --version ] && echo 'Cuda compilation tools, release {release}, V1' || {told}"
    )


# torch


@pytest.mark.parametrize(
    ("number", "supported"),
    [
        ("2.10.0", True),
        ("2.14.1+cu130", True),
        ("3.0", True),
        ("2.9.1", False),
        ("1.13", False),
        ("x", False),
    ],
)
def test_the_oldest_supported_torch(number, supported):
    assert target.torch_requirement() == "torch>=2.10"
    assert target.is_supported(number) is supported


def test_the_torch_of_the_environment_is_found_from_an_isolated_build(monkeypatch, tmp_path):
    """pip hides the environment by PYTHONPATH and a sitecustomize of its own."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('pip hides the environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(target, "_own_torch", lambda: None)
    found = target.find_torch()
    assert found is not None and found.version == version("torch")


def test_a_torch_that_is_too_old_counts_as_none(monkeypatch):
    monkeypatch.setattr(target, "_own_torch", lambda: None)
    monkeypatch.setattr(target, "_torch_of_environment", lambda: target.Torch("2.5.1", []))
    assert target.find_torch() is None


@pytest.mark.parametrize("hook", ["wheel", "editable"])
@pytest.mark.parametrize(
    ("torch", "compiler", "no_ext", "asked"),
    [
        (None, "/usr/bin/c++", "0", True),
        (target.Torch("2.13.0", []), "/usr/bin/c++", "0", False),
        (None, None, "0", False),
        (None, "/usr/bin/c++", "1", False),
    ],
    ids=["no-torch", "torch", "no-compiler", "no-ext"],
)
def test_the_backend_asks_for_torch_only_where_it_is_of_use(
    monkeypatch, hook, torch, compiler, no_ext, asked
):
    monkeypatch.setattr(backend, "find_torch", lambda: torch)
    monkeypatch.setattr(backend, "compiler", lambda: compiler)
    monkeypatch.setenv("CDM_FAST_NO_EXT", no_ext)
    monkeypatch.setattr(backend.build_meta, f"get_requires_for_build_{hook}", lambda settings: ["wheel"])
    wanted = getattr(backend, f"get_requires_for_build_{hook}")()
    assert wanted == ["wheel", *["torch>=2.10"] * asked]


# toolkit


def test_a_wrapper_script_leads_to_the_toolkit_that_it_calls(monkeypatch, tmp_path):
    home = tmp_path / "cuda-13.0"
    nvcc_at(tmp_path / "bin" / "nvcc", top=f"{home}/bin/..")
    (home / "bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    found = toolkit.find_toolkit()
    assert (found.home, found.release) == (home, "13.0")
    assert found.found_by == f"{tmp_path}/bin/nvcc on PATH"


def test_an_nvcc_that_does_not_tell_belongs_to_the_folder_above(tmp_path):
    real = nvcc_at(tmp_path / "toolkit" / "bin" / "nvcc")
    link = tmp_path / "bin" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(real)
    assert toolkit.toolkit_of(link) == tmp_path / "toolkit"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_environment_names_the_toolkit(monkeypatch, tmp_path, variable):
    nvcc_at(tmp_path / "bin" / "nvcc", release="12.8")
    monkeypatch.setenv(variable, str(tmp_path))
    assert toolkit.find_toolkit() == (tmp_path, "12.8", variable)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not run"),
        ("echo 'nvcc: cicc is missing' >&2; exit 3", r"fails with status 3 \(nvcc: cicc is missing\)"),
        ("echo hello", "names no release"),
    ],
    ids=["absent", "failing", "silent"],
)
def test_a_broken_nvcc_is_named(monkeypatch, tmp_path, text, reason):
    if text is not None:
        script(tmp_path / "bin" / "nvcc", text)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(NotPossible, match=f"{tmp_path}/bin/nvcc .*{reason}.*CUDA_HOME"):
        toolkit.find_toolkit()


def test_no_nvcc_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "_DEFAULT_HOME", tmp_path)
    with pytest.raises(NotPossible, match="there is no nvcc: install the CUDA toolkit"):
        toolkit.find_toolkit()


@pytest.mark.parametrize(
    ("force_cpu", "torch_cuda", "reason"),
    [
        ("1", "13.0", "CDM_FAST_FORCE_CPU is set"),
        ("", None, "torch is a build without CUDA"),
        ("", "12.8", r"torch has CUDA 12.8, nvcc is 13.0 \(.*\): install a toolkit of torch's major version"),
    ],
)
def test_why_cuda_kernels_are_left_out(monkeypatch, tmp_path, force_cpu, torch_cuda, reason):
    nvcc_at(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CDM_FAST_FORCE_CPU", force_cpu)
    with pytest.raises(NotPossible, match=reason):
        kernels.cuda_toolkit(torch_cuda)


def test_another_minor_release_will_do(monkeypatch, tmp_path):
    nvcc_at(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert kernels.cuda_toolkit("13.2").home == tmp_path


# compiler


def test_no_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(
        NotPossible, match=r"there is no C\+\+ compiler \(no-such-compiler -O2\): install one"
    ):
        kernels.plan()


def test_without_torch_or_pybind11_it_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "compiler", lambda: "/usr/bin/c++")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "find_torch", lambda: None)
        with pytest.raises(NotPossible, match="there is no torch>=2.10 to build against"):
            kernels.plan()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(NotPossible, match="pip install pybind11, or leave out --no-build-isolation"):
        kernels.plan()


# host compiler


def old_torch():
    """torch.utils.cpp_extension before 2.13, as far as it is asked."""
    return SimpleNamespace()


def new_torch(cache="ccache"):
    """torch.utils.cpp_extension from 2.13 on, which puts a cache that is installed before the compiler."""
    return SimpleNamespace(_wrap_compiler=lambda compiler: [cache, compiler])


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A folder first on PATH with programs that print their own name and their arguments."""
    folder = tmp_path / "tools"
    for name in ("ccache", "sccache", "distcc", "g++", "gcc"):
        script(folder / name, f'printf "%s" {name}; printf " <%s>" "$@"; echo')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def printed_by(program):
    """What a host compiler prints when it is called as torch and nvcc do it: by one word, found on PATH."""
    assert " " not in program
    return subprocess.run(
        [program, "-c", "a b.cpp"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("variable", ["CXX", "CC", "NVCC_CCBIN"])
@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("ccache g++", "ccache <g++> <-c> <a b.cpp>"),
        ("distcc g++", "distcc <g++> <-c> <a b.cpp>"),
        ("g++ -m64 '-DA=b c'", "g++ <-m64> <-DA=b c> <-c> <a b.cpp>"),
        (" g++ ", "g++ <-c> <a b.cpp>"),
    ],
)
def test_a_compiler_of_several_words_is_named_in_one(monkeypatch, tmp_path, tools, variable, command, runs):
    monkeypatch.setenv(variable, command)
    host_compiler.name_in_one_word(old_torch(), tmp_path / "a folder with spaces")
    assert printed_by(os.environ[variable]) == runs


@pytest.mark.parametrize("quote", ["", "'"], ids=["bare", "quoted"])
def test_a_compiler_whose_path_has_spaces(monkeypatch, tmp_path, tools, quote):
    path = script(tmp_path / "my tools" / "g++", 'echo mine "$@"')
    monkeypatch.setenv("CXX", f"{quote}{path}{quote}")
    assert host_compiler.compiler() == str(path)
    host_compiler.name_in_one_word(old_torch(), tmp_path / "build")
    assert printed_by(os.environ["CXX"]) == "mine -c a b.cpp"


@pytest.mark.parametrize(
    ("cxx", "torch", "runs"),
    [
        ("ccache g++", new_torch(), "g++"),
        ("sccache g++", new_torch("sccache"), "g++"),
        ("sccache g++", new_torch(), "sccache <g++>"),
        ("ccache g++ -m64", new_torch(), "g++ <-m64>"),
        ("ccache g++", SimpleNamespace(_wrap_compiler=lambda compiler: [compiler]), "ccache <g++>"),
    ],
    ids=["ccache", "sccache", "other-cache", "options", "switched-off"],
)
def test_a_cache_that_torch_adds_itself_is_not_called_twice(monkeypatch, tmp_path, tools, cxx, torch, runs):
    monkeypatch.setenv("CXX", cxx)
    host_compiler.name_in_one_word(torch, tmp_path)
    assert printed_by(os.environ["CXX"]) == f"{runs} <-c> <a b.cpp>"


@pytest.mark.parametrize("variable", ["CXX", "CC", "NVCC_CCBIN"])
def test_an_empty_compiler_is_as_good_as_none(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, " ")
    host_compiler.name_in_one_word(old_torch(), tmp_path)
    assert variable not in os.environ


def test_the_folder_of_nvccs_compiler_stays_as_it_is(monkeypatch, tmp_path):
    folder = tmp_path / "my tools"
    folder.mkdir()
    monkeypatch.setenv("NVCC_CCBIN", str(folder))
    host_compiler.name_in_one_word(old_torch(), tmp_path / "build")
    assert os.environ["NVCC_CCBIN"] == str(folder)


def test_an_unchanged_script_is_not_written_again(monkeypatch, tmp_path, tools):
    """ccache takes a compiler with another time for another compiler."""
    for _ in range(2):
        monkeypatch.setenv("CXX", "distcc g++")
        host_compiler.name_in_one_word(new_torch(), tmp_path)
        os.utime(tmp_path / "cdm-fast-cxx", (1, 1))
    assert (tmp_path / "cdm-fast-cxx").stat().st_mtime == 1
    assert os.environ["PATH"].split(os.pathsep).count(str(tmp_path)) == 1


@pytest.mark.skipif(host_compiler.compiler() is None, reason="no C++ compiler")
def test_torch_learns_the_version_of_a_wrapped_compiler(monkeypatch, tmp_path):
    """torch before 2.13 takes the version of a wrapper for 0.0.0, which no CUDA toolkit accepts."""
    from torch.utils import cpp_extension

    script(tmp_path / "bin" / "wrapper", '[ $# -gt 1 ] && [ -x "$(command -v "$1")" ] && exec "$@"; exit 1')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "wrapper c++")
    host_compiler.name_in_one_word(cpp_extension, tmp_path / "build")
    _, found = cpp_extension.get_compiler_abi_compatibility_and_version(os.environ["CXX"])
    assert found > "1.0"


@pytest.mark.parametrize(("cxx", "words"), [("ccache g++ -m64", ["ccache", "g++", "-m64"]), ("", ["c++"])])
def test_scripts_ask_for_the_words_of_the_compiler(monkeypatch, tools, cxx, words):
    script(tools / "c++", "exit 0")
    monkeypatch.setenv("CXX", cxx)
    ask = [sys.executable, "-m", "building.host_compiler"]
    assert subprocess.check_output(ask, cwd=kernels.ROOT, text=True).splitlines() == words
    monkeypatch.setenv("CXX", "no-such-compiler g++")
    assert subprocess.run(ask, cwd=kernels.ROOT, capture_output=True).returncode == 1


# architectures and objects


@pytest.mark.parametrize(
    ("given", "sees_gpu", "told", "left"),
    [
        ("7.5", False, "7.5 (TORCH_CUDA_ARCH_LIST)", "7.5"),
        (None, True, "those of the GPUs that torch sees", None),
        (None, False, "8.0;9.0+PTX (no GPU in sight; TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX"),
    ],
)
def test_architectures(monkeypatch, given, sees_gpu, told, left):
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert kernels.choose_architectures(sees_gpu).startswith(told)
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == left


def test_every_source_gets_an_object_file_of_its_own():
    sources = sorted(
        str(path) for path in (kernels.ROOT / "csrc").glob("*.c*") if path.suffix in (".cpp", ".cu")
    )

    def as_distutils(names, output_dir=""):
        return [f"{output_dir}/{Path(name).stem}.o" for name in names]

    assert len(set(as_distutils(sources))) < len(sources)
    objects = kernels.distinct_objects(as_distutils)(sources, output_dir="build")
    assert len(set(objects)) == len(sources)
    assert objects[sources.index(str(kernels.ROOT / "csrc" / "denoise.cu"))] == "build/denoise.cu.o"
    assert objects[sources.index(str(kernels.ROOT / "csrc" / "denoise.cpp"))] == "build/denoise.o"


# what came of it


@pytest.mark.parametrize(
    ("line", "noise"),
    [
        ("csrc/denoise.cu(7): error: expected a declaration", "FAILED: build/denoise.cu.o"),
        ("csrc/noising.cpp:3:1: error: 'nonsense' does not name a type", "[1/2] g++ -Werror -c noising.cpp"),
        ("/usr/bin/ld: cannot find -lcudart: No such file or directory", "g++ -shared -o _C.so"),
        ("OSError: _C.so: undefined symbol: missing_kernel", "Traceback (most recent call last):"),
        ("ninja: error: multiple rules generate denoise.o", "ninja 1.13"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_99'", "FAILED: [code=1] build/denoise.cu.o"),
    ],
)
def test_the_line_that_tells_what_went_wrong(line, noise):
    assert first_complaint(f"{noise}\n  {line}\nlater\n") == line
    assert first_complaint("all is well") is None


def test_output_of_child_processes_is_copied(capfd):
    chunks = []
    with copied_output(chunks):
        subprocess.run(["sh", "-c", "echo out; echo err >&2"], check=True)
        os.write(1, b"own\n")
    os.write(1, b"after\n")
    assert sorted(b"".join(chunks).split()) == [b"err", b"out", b"own"]
    out, err = capfd.readouterr()
    assert "after" in out and "err" in err


def test_a_good_build_removes_an_earlier_log(tmp_path):
    write_record(tmp_path, {"log": "_build.log"}, "error")
    assert (tmp_path / "_build.log").read_text() == "error"
    write_record(tmp_path, {"log": None}, None)
    assert not (tmp_path / "_build.log").exists()
    assert json.loads((tmp_path / "_build.json").read_text()) == {"log": None}


class Build(command.BuildKernels):
    """The command with a compiler that builds only some variants: `works` holds the values of `cuda`."""

    works = ()

    def _build(self, chosen, cuda):
        if cuda not in self.works:
            os.write(2, b"csrc/x: error: broken on purpose\n")  # as a compiler does, past sys.stderr
            raise RuntimeError("Error compiling objects for extension")
        self._product().parent.mkdir(parents=True, exist_ok=True)
        self._product().write_text("new")

    def _check_that_it_loads(self):
        assert self._product().read_text() == "new"


@pytest.fixture
def build(monkeypatch, tmp_path, capfd):
    """Runs the command over an older library; returns the record, the log, and whether a library is left."""

    def run(works, toolkit_found=True, plan=None):
        if plan is None:
            torch = SimpleNamespace(
                __version__="2.13.0",
                version=SimpleNamespace(cuda="13.0"),
                cuda=SimpleNamespace(is_available=lambda: False),
            )
            found = toolkit.Toolkit(tmp_path, "13.0", "a test") if toolkit_found else None
            chosen = kernels.Plan(torch, SimpleNamespace(), found, None if found else "there is no nvcc")
            plan = lambda: chosen  # noqa: E731
        monkeypatch.setattr(command, "plan", plan)
        monkeypatch.setattr(Build, "works", works)
        ready = Build(Distribution({"name": "cdm_fast", "ext_modules": []}))
        ready.build_lib = str(tmp_path / "lib")
        ready.ensure_finalized()
        product = Path(ready.get_ext_fullpath("cdm_fast._C"))
        product.parent.mkdir(parents=True, exist_ok=True)
        product.write_text("of an older build")
        try:
            ready.run()
        finally:
            log = product.parent / "_build.log"
            run.record = json.loads((product.parent / "_build.json").read_text())
            run.log = log.read_text() if log.exists() else None
        return run.record, run.log, product.exists()

    return run


def test_the_check_of_loading_sees_the_torch_of_the_build(monkeypatch, tmp_path):
    """pip's isolated build has a sitecustomize that takes the environment's packages off sys.path."""
    extension = pytest.importorskip("cdm_fast.ops").backend._extension()
    if isinstance(extension, ImportError):
        pytest.skip("no extension is built here")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path[:] = []")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command.BuildKernels, "_product", lambda self: Path(extension.__file__))
    command.BuildKernels(Distribution({"name": "cdm_fast"}))._check_that_it_loads()


def test_everything_builds(build):
    record, log, there = build((True, False))
    assert record["built"] == ["cpp", "cuda"] and record["left_out"] == {} and record["log"] is None
    assert record["architectures"].startswith("8.0;9.0+PTX") and "found by a test" in record["toolkit"]
    assert log is None and there


def test_a_broken_cuda_source_leaves_the_cpp_kernels(build):
    record, log, there = build((False,))
    assert record["built"] == ["cpp"] and there
    assert record["left_out"] == {"cuda": "building failed (csrc/x: error: broken on purpose)"}
    assert record["log"] == "_build.log" and "broken on purpose" in log


def test_without_a_toolkit_only_the_cpp_kernels_are_tried(build):
    record, log, there = build((False,), toolkit_found=False)
    assert record["built"] == ["cpp"] and record["left_out"] == {"cuda": "there is no nvcc"}
    assert log is None and there


def test_a_broken_compiler_leaves_pure_python_and_no_library_of_an_older_build(build):
    record, log, there = build(())
    assert record["built"] == [] and set(record["left_out"]) == {"cpp", "cuda"}
    assert log.count("broken on purpose") == 2 and not there


def test_no_compiler_leaves_pure_python(build):
    def plan():
        raise NotPossible("there is no C++ compiler (c++): install one, or set CXX")

    record, log, there = build((), plan=plan)
    assert record["left_out"]["cpp"].startswith("there is no C++ compiler") and record["built"] == []
    assert log is None and not there


@pytest.mark.parametrize("works", [(False,), ()], ids=["cuda-fails", "all-fail"])
def test_kernels_that_are_required_and_fail_stop_the_install(build, monkeypatch, works):
    monkeypatch.setenv("CDM_FAST_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="CDM_FAST_REQUIRE_EXT is set, but building failed .*on purpose"):
        build(works)
    assert "broken on purpose" in build.log


def test_a_required_build_without_nvcc_passes(build, monkeypatch):
    monkeypatch.setenv("CDM_FAST_REQUIRE_EXT", "1")
    assert build((False,), toolkit_found=False)[2]


@pytest.mark.parametrize(
    "variable, value, debug",
    [
        ("CFLAGS", "", False),
        ("CFLAGS", "-O2 -funroll-loops", False),
        ("CFLAGS", "-O2 -g1", True),
        ("CXXFLAGS", "-g", True),
    ],
)
def test_the_library_has_debug_information_only_on_request(monkeypatch, variable, value, debug):
    monkeypatch.delenv("CFLAGS", raising=False)
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.setenv(variable, value)
    assert ("-g0" not in kernels.cxx_flags()) is debug


def test_pure_python_on_request(monkeypatch):
    monkeypatch.setenv("CDM_FAST_NO_EXT", "1")
    assert command.setup_arguments() == {}
    monkeypatch.setenv("CDM_FAST_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="both set"):
        command.setup_arguments()
