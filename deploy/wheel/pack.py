#!/usr/bin/env python3
"""Packs fleet's programs as a wheel for pip, or as an archive for those who have a libtorch. Needs Python 3.8 or newer, and `strip`.

    deploy/wheel/pack.py wheel   --programs target/debug --out dist
    deploy/wheel/pack.py tarball --programs target/debug --out dist

The same programs give the same bytes: times in the archives are SOURCE_DATE_EPOCH, else those of the commit.
"""

import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from elf import Elf

HERE = Path(__file__).resolve().parent
CLONE = HERE.parent.parent
PROGRAMS = ["fleet", "coordinator", "worker", "fleet-rank"]
FOR_USERS = PROGRAMS[:3]  # fleet-rank is started by the others
# Where fleet-rank looks for libtorch: in a wheel beside the package, in an archive in a folder that its user makes.
BESIDE_PACKAGE, IN_ARCHIVE = "$ORIGIN/../../torch/lib", "$ORIGIN/../libtorch/lib"
OF_LIBTORCH = {"libtorch_cpu.so", "libc10.so"}
# What a manylinux system has, and the newest libstdc++ of each: https://github.com/pypa/auditwheel, manylinux-policy.json
OF_EVERY_SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
GLIBCXX_OF = {(2, 28): 25, (2, 31): 28, (2, 34): 29, (2, 35): 30, (2, 39): 33}


def die(message):
    sys.exit(f"pack: error: {message}")


def said(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Fleet:
    """The programs as they are packed, and what they say of themselves."""

    def __init__(self, programs, runpath):
        self.dir = Path(programs)
        missing = [name for name in PROGRAMS if not (self.dir / name).is_file()]
        if missing:
            die(f"{self.dir} has no {', '.join(missing)}; build them first: `make programs`")
        self.version = said(str(self.dir / "fleet"), "--version").split()[-1]
        self.torch = json.loads(said(str(self.dir / "fleet-rank"), "--probe"))["libtorch"]
        self.elfs = {name: self.stripped(name) for name in PROGRAMS}
        self.elfs["fleet-rank"].look_in(runpath)

    def stripped(self, name):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / name
            said("strip", "--strip-debug", "-o", str(out), str(self.dir / name))
            return Elf(out.read_bytes())

    def platform(self):
        """The oldest Linux on which all of them run, as the tag of a wheel names it."""
        needed = set().union(*(elf.needed() for elf in self.elfs.values())) - OF_LIBTORCH
        versions = set().union(*(elf.versions() for elf in self.elfs.values()))
        newest = lambda library: max(
            (tuple(map(int, v.split("_", 1)[1].split("."))) for v in versions if re.fullmatch(library + r"_[\d.]+", v)), default=(0,)
        )
        machine = platform.machine()
        if needed - OF_EVERY_SYSTEM:
            print(f"pack: the wheel is for systems like this one: not every Linux has {', '.join(sorted(needed - OF_EVERY_SYSTEM))}")
            return f"linux_{machine}"
        fits = [glibc for glibc, cxx in sorted(GLIBCXX_OF.items()) if newest("GLIBC")[:2] <= glibc and newest("GLIBCXX") <= (3, 4, cxx)]
        return f"manylinux_{fits[0][0]}_{fits[0][1]}_{machine}" if fits else f"linux_{machine}"

    def files(self):
        """What goes below `share`: pages for man, and completions."""
        for name in FOR_USERS:
            program = str(self.dir / name)
            for shell, place in [("bash", f"bash-completion/completions/{name}"), ("zsh", f"zsh/site-functions/_{name}"), ("fish", f"fish/vendor_completions.d/{name}.fish")]:
                yield place, said(program, "completions", shell).encode()
            with tempfile.TemporaryDirectory() as temporary:
                said(program, "manual", "--man", temporary)
                for page in sorted(Path(temporary).iterdir()):
                    yield f"man/man1/{page.name}", page.read_bytes()


def when():
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        git = subprocess.run(["git", "-C", str(CLONE), "log", "-1", "--format=%ct"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        epoch = git.stdout.strip() or 315532800  # 1980, where the time of zip files begins
    return int(epoch)


def examples():
    for path in sorted((CLONE / "examples").iterdir()):
        yield path.name, path.read_bytes()


def metadata(fleet):
    return "\n".join([
        "Metadata-Version: 2.1",
        "Name: fleet-train",
        f"Version: {fleet.version}",
        "Summary: Trains and fine-tunes neural networks on a cluster, without Python at run time",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        f"Requires-Dist: torch=={fleet.torch}",
        "Classifier: Operating System :: POSIX :: Linux",
        "Description-Content-Type: text/markdown",
        "",
        (HERE / "README.md").read_text(),
    ])


def wheel(programs, out):
    fleet = Fleet(programs, BESIDE_PACKAGE)
    tag = f"py3-none-{fleet.platform()}"
    name = f"fleet_train-{fleet.version}"
    entries = []  # path, bytes, whether it can be run

    for path in sorted((HERE / "fleet_train").glob("*.py")):
        entries.append((f"fleet_train/{path.name}", path.read_bytes(), False))
    for program, elf in fleet.elfs.items():
        entries.append((f"fleet_train/bin/{program}", bytes(elf.data), True))
        launcher = (HERE / "launcher.sh").read_text().replace("@PROGRAM@", program)
        entries.append((f"{name}.data/scripts/{program}", launcher.encode(), True))
    for place, content in fleet.files():
        entries.append((f"{name}.data/data/share/{place}", content, False))
    for example, content in examples():
        entries.append((f"{name}.data/data/share/fleet/examples/{example}", content, False))
    info = f"{name}.dist-info"
    entries.append((f"{info}/LICENSE.txt", (HERE / "LICENSE.txt").read_bytes(), False))
    entries.append((f"{info}/METADATA", metadata(fleet).encode(), False))
    entries.append((f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: fleet\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(), False))

    digest = lambda content: base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    record = "".join(f"{path},sha256={digest(content)},{len(content)}\n" for path, content, _ in entries)
    entries.append((f"{info}/RECORD", f"{record}{info}/RECORD,,\n".encode(), False))

    target = out / f"{name}-{tag}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path, content, can_run in entries:
            entry = zipfile.ZipInfo(path, time.gmtime(max(when(), 315532800))[:6])
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whose rights are in the upper half
            entry.external_attr = (0o100755 if can_run else 0o100644) << 16
            archive.writestr(entry, content)
    return target, sum(len(content) for _, content, _ in entries)


def tarball(programs, out):
    fleet = Fleet(programs, IN_ARCHIVE)
    name = f"fleet-train-{fleet.version}-{fleet.platform()}"
    entries = [(f"bin/{program}", bytes(elf.data), 0o755) for program, elf in fleet.elfs.items()]
    entries += [(f"share/{place}", content, 0o644) for place, content in fleet.files()]
    entries += [(f"examples/{example}", content, 0o644) for example, content in examples()]
    entries += [("README.md", (CLONE / "README.md").read_bytes(), 0o644), ("INSTALL.md", (CLONE / "docs/install.md").read_bytes(), 0o644)]
    entries.append(("LICENSE", (HERE / "LICENSE.txt").read_bytes(), 0o644))

    target, packed = out / f"{name}.tar.gz", io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, content, mode in sorted(entries):
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size, entry.mode, entry.mtime = len(content), mode, when()
            archive.addfile(entry, io.BytesIO(content))
    with open(target, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=when()) as archive:
        archive.write(packed.getvalue())
    return target, sum(len(content) for _, content, _ in entries)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wheel", "tarball"])
    parser.add_argument("--programs", required=True, help="the folder of the programs")
    parser.add_argument("--out", type=Path, required=True, help="where to write it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    target, size = {"wheel": wheel, "tarball": tarball}[args.what](args.programs, args.out)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB when it is unpacked")


if __name__ == "__main__":
    main()
