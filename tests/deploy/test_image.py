"""The image as far as it can be made without an engine: linted, locked, and its own steps run in a clean folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from grokmoe_image.__main__ import main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.rendered import DEPLOY, ROOT, containers, objects

DOCKERFILE = DEPLOY / "Dockerfile"
LOCKS = {name: DEPLOY / f"requirements-{name}.lock" for name in ("cpu", "cuda")}


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of one stage, its FROM first."""
    found: list[tuple[str, str]] = []
    inside = False
    for word, rest in instructions():
        if word == "FROM":
            inside = rest.endswith(f" AS {name}")
        if inside:
            found.append((word, rest))
    assert found, name
    return found


def locked(name: str) -> dict[str, str]:
    """Package -> version of a lock file."""
    pins = re.findall(r"^([a-zA-Z0-9_.-]+)==([^\s;\\]+)", LOCKS[name].read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in pins}


def test_the_dockerfile_has_no_findings() -> None:
    # It is a program, not a module: beside the interpreter, or on the path.
    hadolint = shutil.which("hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert hadolint, "the extra `dev` has it"
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_has_what_the_project_asks_for(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    roles = ("server", "otel", "smg", *(("gpu",) if name == "cuda" else ()))
    wanted = [*project["dependencies"], *(one for role in roles for one in extras[role])]
    pins = locked(name)
    for requirement in map(Requirement, wanted):
        version = Version(pins[canonicalize_name(requirement.name)])
        assert version.public in requirement.specifier, requirement
    dev = {Requirement(text).name: Requirement(text) for text in extras["dev"]}
    assert Version(pins["torch"]).public in dev["torch"].specifier, "the version that the tests run with"


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_file_has_hashes_and_no_address(name: str) -> None:
    text = LOCKS[name].read_text()
    entries = re.sub(r"\\\n\s*", " ", text).strip().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==\S+( ; .+?)?(\s+--hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)
    assert "://" not in text
    assert "/" not in text.replace("sha256:", "")
    assert len(entries) == len(locked(name))


def test_only_the_image_for_gpus_has_what_gpus_need() -> None:
    assert {"triton", "nvidia-cublas"} <= set(locked("cuda"))
    assert not {package for package in locked("cpu") if package.startswith(("nvidia-", "triton", "cuda-"))}
    assert locked("cpu")["torch"].endswith("+cpu")


def test_the_image_is_not_root_and_starts_a_role() -> None:
    final = dict(stage("image"))
    user, _, group = final["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    for _, template, _ in containers(objects("defaults")):
        assert template["spec"]["securityContext"]["runAsUser"] == int(user)
    assert final["ENTRYPOINT"] == '["/opt/grokmoe/venv/bin/python", "-m", "grokmoe_image"]'
    labels = final["LABEL"]
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    # No compiler, and nothing installed: the last stage copies only.
    assert [word for word, _ in stage("image") if word == "RUN"] == []


def test_what_the_image_sets_is_what_the_entry_point_reads() -> None:
    from grokmoe_image import triton_driver

    environment = dict(re.findall(r"(\w+)=(\S+)", dict(stage("image"))["ENV"]))
    assert environment[triton_driver.SEED] == "/opt/grokmoe/triton"
    assert environment[triton_driver.CACHE].startswith("/tmp/"), "all that is written is under /tmp"
    assert environment["HOME"] == "/tmp"
    assert environment["PYTHONPATH"] == "/opt/grokmoe/image"


def test_what_is_copied_exists_and_is_let_into_the_build() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word != "COPY" or rest.startswith("--from"):
            continue
        *sources, _ = rest.split()
        for source in sources:
            for name in LOCKS:
                path = source.replace("${ACCELERATOR}", name)
                assert (ROOT / path).exists(), path
                assert any(path == one or path.startswith(f"{one}/") for one in allowed), (
                    f".dockerignore keeps out {path}"
                )


class Build:
    """A folder in which stages' COPY and RUN are done, `/` being the folder."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._root, self._environment = root, environment
        self._folder = "/"

    def here(self, path: str) -> Path:
        """A path of the image on this machine."""
        return self._root / path.lstrip("/")

    def enter(self, folder: str) -> None:
        """WORKDIR."""
        self._folder = folder
        self.here(folder).mkdir(parents=True, exist_ok=True)

    def do(self, name: str, skip: str = "") -> None:
        """All of a stage; RUN lines that contain `skip` are left out."""
        for word, rest in stage(name):
            if word == "WORKDIR":
                self.enter(rest)
            elif word == "COPY":
                self._copy(rest.replace("${ACCELERATOR}", "cpu"))
            elif word == "RUN" and not (skip and skip in rest):
                self.run(rest)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        into = self.here(target if target.startswith("/") else f"{self._folder}/{target}")
        for source in sources:
            path = ROOT / source
            if path.is_dir():
                shutil.copytree(path, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                into.mkdir(parents=True, exist_ok=True) if target.endswith("/") else into.parent.mkdir(
                    parents=True, exist_ok=True
                )
                shutil.copy(path, into)

    def run(self, line: str) -> str:
        """A RUN line that succeeds. Returns what it wrote."""
        done = self.attempt(line)
        assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def attempt(self, line: str) -> subprocess.CompletedProcess[str]:
        """A RUN line, its absolute paths below the folder."""
        local = re.sub(r"(?<![\w./])/(build|opt|var/lib/apt)/", f"{self._root}/\\1/", line)
        return subprocess.run(
            ["/bin/sh", "-ec", local],
            cwd=self.here(self._folder),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )


def environment(**more: str) -> dict[str, str]:
    """Without this checkout on the path: the image has not got it either. What pip and uv are told to use stays."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "LANG", "HOME"))}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return kept | {"PATH": path} | more


def show_packages(venv: Path, folder: Path) -> None:
    """Makes the packages of this environment visible in another one; not the project itself, installed or not."""
    folder.mkdir()
    for path in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in path.iterdir():
            if not entry.name.startswith(("grokmoe", "__editable__")) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    site_packages = next((venv / "lib").glob("python*")) / "site-packages"
    (site_packages / "packages-of-this-environment.pth").write_text(f"{folder}\n")


RUN_BY = {
    "packages": "test_packages_are_installed_by_their_hashes",
    "project": "test_the_project_is_packaged_whole_by_the_images_steps",
    "accelerator-cuda": "test_the_binding_to_the_driver_is_built_with_the_image_and_found_in_the_pod",
    "accelerator-cpu": "test_the_image_for_cpus_has_no_binding",
}
"""Stage -> the test that runs its RUN lines; of `accelerator-cuda` the compiler is got by the one after it."""


def test_every_run_line_is_run_here() -> None:
    stages = [rest.rpartition(" AS ")[2] for word, rest in instructions() if word == "FROM"]
    assert {name for name in stages if any(word == "RUN" for word, _ in stage(name))} == set(RUN_BY)
    assert all(test in globals() for test in RUN_BY.values())


SMALL = ("click", "filelock", "typing-extensions", "wheel")
"""Of the lock file what is downloaded in a moment."""


def lock_of(names: Sequence[str], text: str) -> str:
    """A lock file's entries of some packages."""
    return "".join(re.findall(rf"^(?:{'|'.join(names)})==.*(?:\n +--hash.*)+\n", text, re.MULTILINE))


def test_packages_are_installed_by_their_hashes(tmp_path: Path) -> None:
    """RUN of the stage `packages` with the small ones of its lock file; whole: test_all_steps_of_the_image_for_cpus."""
    empty = tmp_path / "empty"
    empty.mkdir()
    ((_, line),) = [one for one in stage("packages") if one[0] == "RUN"]
    lock = lock_of(SMALL, LOCKS["cpu"].read_text())
    assert lock.count("==") == len(SMALL)
    for folder, content in (("good", lock), ("bad", re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", lock))):
        build = Build(tmp_path / folder, environment(TORCH_INDEX=empty.as_uri(), PIP_RETRIES="1", PIP_TIMEOUT="20"))
        for word, rest in stage("packages"):
            if word == "WORKDIR":
                build.enter(rest)
        build.here("/build/requirements.lock").write_text(content)
        done = build.attempt(line)
        if re.search(r"Could not find a version|Connection|Temporary failure", done.stderr):
            pytest.skip("no package index is reached from here")
        if folder == "good":
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode != 0, "a package that is not the one of the lock file was installed"
            assert "DO NOT MATCH THE HASHES" in done.stderr
    installed = {path.name.partition("-")[0] for path in (tmp_path / "good/opt").rglob("*.dist-info")}
    assert installed == {name.replace("-", "_") for name in SMALL}


def test_the_image_for_cpus_has_no_binding(tmp_path: Path) -> None:
    build = Build(tmp_path, environment())
    build.enter("/build/source")
    build.do("accelerator-cpu")
    assert list(build.here("/opt/grokmoe/triton").iterdir()) == []


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the image is Debian's, this machine is not")
def test_the_compiler_is_got_and_its_lists_are_left_behind(tmp_path: Path) -> None:
    """The RUN line with apt-get, in folders of its own, up to where packages would be unpacked."""
    (line,) = [rest for word, rest in stage("accelerator-cuda") if word == "RUN" and "apt-get" in rest]
    lists, cache = tmp_path / "var/lib/apt/lists", tmp_path / "cache"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True)
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::State::lists "{lists}";\nDir::Cache "{cache}";\nAPT::Sandbox::User "root";\n'
        f'APT::Get::Simulate "true";\nDebug::NoLocking "true";\n'
    )
    build = Build(tmp_path, environment(APT_CONFIG=str(config)))
    build.enter("/build")
    update, _, rest = line.partition(" && ")
    if build.attempt(update).returncode:
        pytest.skip("no package lists are reached from here")
    assert list(lists.glob("*Packages*")), "nothing was listed"
    said = build.run(rest)
    assert re.search(r"gcc", said)
    assert list(lists.iterdir()) == [], "lists would be in the image's layers"


def test_the_project_is_packaged_whole_by_the_images_steps(tmp_path: Path) -> None:
    """COPY and RUN of the stage `project`, with the packages of this environment in place of the lock file's."""
    build = Build(tmp_path, environment())
    venv = tmp_path / "opt/grokmoe/venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    show_packages(venv, tmp_path / "packages")
    build.do("project")
    (wheel,) = (tmp_path / "build/wheels").glob("grokmoe-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        for path in (ROOT / package.rstrip("*")).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in names
    assert "launcher/demo_model/model.safetensors" in names
    assert (tmp_path / "opt/grokmoe/demo_model/config.json").exists()
    # As a pod would: the image's entry point becomes the role, from what was installed and not from the checkout.
    python = str(venv / "bin/python")
    settings = environment(PYTHONPATH=str(tmp_path / "opt/grokmoe/image"))
    done = subprocess.run(
        [python, "-m", "grokmoe_image", "generate", "--help"],
        env=settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--max-tokens" in done.stdout
    where = subprocess.run(
        [python, "-c", "import launcher; print(launcher.__file__)"],
        env=settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(venv))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler here, as there is in the build")
def test_the_binding_to_the_driver_is_built_with_the_image_and_found_in_the_pod(tmp_path: Path) -> None:
    """RUN lines of the stage for CUDA; then Triton, without a compiler, finds what it would have compiled."""
    pytest.importorskip("triton")
    build = Build(tmp_path, environment())
    shutil.copytree(DEPLOY / "image" / "grokmoe_image", tmp_path / "opt/grokmoe/image/grokmoe_image")
    for word, rest in stage("accelerator-cuda"):
        if word == "RUN" and "apt-get" not in rest:
            build.run(rest.replace("/opt/grokmoe/venv/bin/python", sys.executable))
    (built,) = (tmp_path / "opt/grokmoe/triton").rglob("cuda_utils*.so")
    assert built.stat().st_size > 10_000
    # In the pod: no compiler on the path, an empty cache that the entry point fills.
    pod = tmp_path / "pod"
    program = (
        "import os; from grokmoe_image import triton_driver; triton_driver.seed(os.environ)\n"
        "from pathlib import Path\n"
        "from triton.backends.nvidia import driver\n"
        "from triton.runtime import build\n"
        "found = []\n"
        "build._load_module_from_path = lambda name, path: found.append(path)\n"  # there is no driver to load it with
        "build.compile_module_from_src(Path(driver.__file__).with_name('driver.c').read_text(), 'cuda_utils')\n"
        "print(found[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            "PATH": "/nowhere",
            "PYTHONPATH": str(tmp_path / "opt/grokmoe/image"),
            "GROKMOE_IMAGE_TRITON_SEED": str(tmp_path / "opt/grokmoe/triton"),
            "TRITON_CACHE_DIR": str(pod),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(pod))


@pytest.mark.skipif(
    "GROKMOE_IMAGE_BUILD" not in os.environ, reason="downloads what the image holds; set GROKMOE_IMAGE_BUILD"
)
def test_all_steps_of_the_image_for_cpus(tmp_path: Path) -> None:
    """The stages `packages` and `project` as they are, hashes checked, and a role of it started."""
    build = Build(
        tmp_path, environment(TORCH_INDEX=os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu"))
    )
    build.do("packages")
    build.do("project")
    said = build.run("PYTHONPATH=/opt/grokmoe/image /opt/grokmoe/venv/bin/python -m grokmoe_image router --help")
    assert "--max-running" in said
    installed = {path.name.split("-")[0].lower() for path in (tmp_path / "opt").rglob("*.dist-info")}
    assert {name.replace("-", "_") for name in locked("cpu")} <= {
        name.replace("-", "_").replace(".", "_") for name in installed
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["rooter"], "there is no role 'rooter'"), (["expert-worker", "--experts-of=/nowhere"], "No such file")],
)
def test_the_entry_point_says_what_is_wrong(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments, {"POD_INDEX": "0"}) == 2
    assert words in capsys.readouterr().err


def test_the_entry_point_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], {}) == 0
    assert "attention-worker" in capsys.readouterr().out


def test_a_role_replaces_the_entry_point() -> None:
    """Its exit code and its words are those of the role."""
    done = subprocess.run(
        [sys.executable, "-m", "grokmoe_image", "generate"],
        env=environment(PYTHONPATH=os.pathsep.join((str(DEPLOY / "image"), str(ROOT)))),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "the text to continue is missing" in done.stderr
