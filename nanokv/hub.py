"""Large sets from the Hugging Face hub: streamed, tokenized in batches, sharded, resumed after a kill."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanokv import dataset_writer, tokenizer
from nanokv.config import UserError, parse
from nanokv.dataset_writer import SHARD_TOKENS, UNFINISHED, Piece, Writer, split_of


@dataclass
class HubFlags(dataset_writer.Flags):
    tokenizer: str = "gpt2"  # byte, bpe (trained on the first 100 MB) or gpt2
    vocab_size: int = 32768  # ids of the bpe tokenizer, <|endoftext|> included
    val_fraction: float = 0.005  # share of the documents held out for validation
    max_tokens: int = 0  # stop after about so many train tokens; 0: take all
    shard_tokens: int = SHARD_TOKENS  # train tokens in a shard; after a kill, at most one shard is repeated
    input: str = ""  # local parquet files or folders to read instead of the hub, separated by commas
    text_key: str = "text"  # column that holds the text


def prepare_streamed(argv: list[str], here: str, repo: str, **source: str) -> None:
    """Writes the set of the prepare.py `here` from the hub's `repo`. After a kill, continues after the last shard."""
    own = Path(here).parent
    flags = parse(HubFlags, argv, f"python data/{own.name}/prepare.py [--key=value ...]")
    folder = Path(flags.out_dir or own)
    if (folder / "meta.json").exists():
        print(f"{folder} is prepared; to make it anew, remove its meta.json")
        return
    made_with, progress = asdict(flags) | {"out_dir": ""}, folder / UNFINISHED / "progress.json"
    state = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else None
    if state and state["flags"] != made_with:
        old = " ".join(f"--{k}={v}" for k, v in state["flags"].items() if v != made_with[k])
        raise UserError(f"{folder} was begun with {old}: give that too, or remove {progress} to start over")
    stream = open_stream(flags, repo, **source)
    if state:
        print(f"going on after {state['shard']} shards, {state['tokens']['train']:,} train tokens")
        tok = tokenizer.load(folder / UNFINISHED)
        stream.load_state_dict(state["stream"])
    else:
        tok = tokenizer.train(flags.tokenizer, texts(stream, flags.text_key), flags.vocab_size)
        stream = open_stream(flags, repo, **source)
    writer, rows = Writer(folder, tok, state=state), texts(stream, flags.text_key)
    pieces = (Piece(split_of(text.encode(), flags.val_fraction), text) for text in rows)
    sizes = flags.shard_tokens, flags.max_tokens
    writer.add_all(pieces, *sizes, lambda: {"stream": stream.state_dict(), "flags": made_with})
    writer.finish(source=flags.input or repo)


def open_stream(flags: HubFlags, repo: str, subset: str | None = None, revision: str | None = None) -> Any:
    """A streamed datasets.IterableDataset. Raises UserError, at once if there is no network."""
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError("this data set is read by datasets: `pip install datasets`") from None
    if flags.input:
        files = [str(path) for path in dataset_writer.find_files(flags.input, (".parquet",))]
        stream: Any = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        try:  # ask the hub first, because load_dataset retries for half a minute
            huggingface_hub.HfApi().dataset_info(repo, timeout=10)
            stream = datasets.load_dataset(repo, subset, revision=revision, split="train", streaming=True)
        except Exception as e:  # the HTTP client and its error classes vary by version
            fault = f"cannot reach {repo} on the Hugging Face hub ({type(e).__name__})"
            raise UserError(f"{fault}: connect to the network, or give parquet files by --input") from e
    if flags.text_key not in (columns := stream.column_names or [flags.text_key]):
        raise UserError(f"no column {flags.text_key!r}: --text_key is one of {', '.join(columns)}")
    return stream


def texts(stream: Iterable[dict], key: str) -> Iterator[str]:
    try:
        for row in stream:
            if row[key] is not None:
                yield row[key].encode("utf-8", "replace").decode()
    except Exception as e:  # as above
        raise UserError(f"reading stopped ({type(e).__name__}: {e}): run the same command to go on") from e
