"""Image files packed by other people's tools, set up as their manuals show it."""

import io
import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from pipeline.data.sample import Sample, Texts
from pipeline.data.tars.shard import ShardWriter
from pipeline.digest import digest_of
from pipeline.errors import PipelineError

SAMPLES_PER_SHARD = 1000
_THREADS = 16  # of img2dataset's reading; its default, 256, is for the network


def tar_version() -> str | None:
    """Returns what GNU tar calls itself, or None if `tar` is absent or another one."""
    if shutil.which("tar") is None:
        return None
    line = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout
    return line.splitlines()[0] if "GNU" in line else None


def tar(images: Path, output: Path) -> None:
    """Writes one tar of the images, in the order of their names, uncompressed."""
    names = output.with_suffix(".names")
    names.write_text("\n".join(path.name for path in image_files(images)))
    command = ["tar", "-C", str(images), "-cf", str(output), "-T", str(names)]
    subprocess.run(command, check=True)


def webdataset_version() -> str | None:
    """Returns the version, or None if it is not installed."""
    try:
        return version("webdataset")
    except PackageNotFoundError:
        return None


def shard_writer(images: Path, captions: dict[str, str], output: Path) -> None:
    """Writes each image with its caption by webdataset's ShardWriter."""
    import webdataset

    output.mkdir()
    pattern = str(output / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for path in image_files(images):
            caption = captions[path.name]
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": caption})


class Img2Dataset:
    """The command `img2dataset`, from an environment of its own: it needs an old webdataset."""

    def __init__(self, executable: str) -> None:
        self.executable = executable
        python = Path(executable).read_text().splitlines()[0].removeprefix("#!").strip()
        ask = "import importlib.metadata as m; print(m.version('img2dataset'))"
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        if answer.returncode:
            raise PipelineError(f"{executable}: no img2dataset in its Python: {answer.stderr}")
        self.version = answer.stdout.strip()

    @classmethod
    def find(cls, executable: str | None) -> "Img2Dataset | None":
        """Returns it, if it is given or on the PATH."""
        found = executable or shutil.which("img2dataset")
        return None if found is None else cls(found)

    def run(
        self, images: Path, captions: dict[str, str], output: Path, shorter_side: int | None
    ) -> None:
        """Reads `file://` URLs; raises PipelineError unless every image was written."""
        listing = output.with_suffix(".jsonl")
        files = image_files(images)
        lines = ({"url": path.as_uri(), "caption": captions[path.name]} for path in files)
        listing.write_text("\n".join(map(json.dumps, lines)))
        command = [
            self.executable,
            f"--url_list={listing}",
            "--input_format=jsonl",
            "--url_col=url",
            "--caption_col=caption",
            "--output_format=webdataset",
            f"--output_folder={output}",
            "--processes_count=1",
            f"--thread_count={_THREADS}",
            f"--number_sample_per_shard={SAMPLES_PER_SHARD}",
            *self._size(shorter_side),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        stats = [json.loads(path.read_text()) for path in output.glob("*_stats.json")]
        if done.returncode or sum(each["successes"] for each in stats) != len(files):
            raise PipelineError(f"img2dataset did not write every image: {done.stderr[-2000:]}")

    def _size(self, shorter_side: int | None) -> list[str]:
        if shorter_side is None:
            return ["--resize_mode=no", "--skip_reencode=True"]
        return [
            "--resize_mode=keep_ratio",
            f"--image_size={shorter_side}",
            "--resize_only_if_bigger=True",
            "--encode_quality=95",
        ]


def bare_shards(images: Path, captions: dict[str, str], output: Path) -> None:
    """Writes what our ingest writes, and does nothing else of it: no listing, no manifest."""
    paths = iter(image_files(images))
    while part := list(islice(paths, SAMPLES_PER_SHARD)):
        with ShardWriter(str(output)) as writer:
            for path in part:
                with io.FileIO(path) as file:
                    payload = file.read()
                digest_of(payload)
                texts = Texts(path.stem, (captions[path.name],)).to_json()
                writer.write(Sample(path.stem, {"jpg": payload, "json": texts}))


def image_files(folder: Path) -> list[Path]:
    """Returns the JPEG files of a folder, sorted by name."""
    return sorted(folder.glob("*.jpg"))
