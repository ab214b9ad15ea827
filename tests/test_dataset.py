"""The dataset artefact: written and read back, splits, and files that do not agree."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calrec_jax import artifacts
from calrec_jax.data import dataset as dataset_lib
from calrec_jax.data.dataset import Dataset, save_dataset
from calrec_jax.data.tables import ContentDigest
from calrec_jax.data.templates import ATTRIBUTES, Template
from calrec_jax.errors import CalrecError


def random_rows(seed, users=7, items=11):
    """Items and sequences as plain lists, in shuffled row order."""
    rng = np.random.default_rng(seed)
    catalogue = [
        {"item_id": f"i{i:02}", **{name: None if rng.random() < 0.3 else f"{name} {i}" for name in ATTRIBUTES}}
        for i in rng.permutation(items)
    ]
    sequences = []
    for user in rng.permutation(users):
        length = int(rng.integers(3, 9))
        sequences.append(
            {
                "user_id": f"u{user}",
                "item_ids": [f"i{i:02}" for i in rng.integers(0, items, length)],
                "timestamps": sorted(int(t) for t in rng.integers(0, 2**40, length)),
                "valid_position": length - 2,
                "test_position": length - 1,
            }
        )
    return catalogue, sequences


def save(folder, catalogue, sequences, **kwargs):
    return save_dataset(
        folder,
        name="toy",
        items=pa.Table.from_pylist(catalogue, dataset_lib.ITEMS_SCHEMA.remove(5)),
        sequences=pa.Table.from_pylist(sequences, dataset_lib.SEQUENCES_SCHEMA),
        template=Template(),
        card={"note": "a card"},
        made_from={"reviews": "abc"},
        settings={"min_length": 3},
        **kwargs,
    )


@pytest.mark.parametrize("seed", range(3))
def test_reads_back_what_was_written(tmp_path, seed):
    catalogue, sequences = random_rows(seed)
    dataset = save(tmp_path / "d", catalogue, sequences)
    catalogue.sort(key=lambda row: row["item_id"])
    sequences.sort(key=lambda row: row["user_id"])
    assert dataset.item_ids.tolist() == [row["item_id"] for row in catalogue]
    assert dataset.texts == [Template().item_text(row) for row in catalogue]
    assert dataset.attributes == {name: [row[name] for row in catalogue] for name in ATTRIBUTES}
    assert dataset.user_ids.tolist() == [row["user_id"] for row in sequences]
    assert dataset.card["note"] == "a card" and dataset.name == "toy"
    assert dataset.template == Template().fingerprint
    assert dataset.hash == artifacts.read_manifest(tmp_path / "d", kind="dataset")["hash"]
    for user, row in enumerate(sequences):
        begin, end = dataset.offsets[user : user + 2]
        assert dataset.timestamps[begin:end].tolist() == row["timestamps"]
        ids = row["item_ids"]

        def names(indices):
            return dataset.item_ids[indices].tolist()

        assert names(dataset.items[begin:end]) == ids
        assert names(dataset.history(user, "test")) == ids[:-1]
        assert names(dataset.history(user, "validation")) == ids[:-2] == names(dataset.train_items(user))
        assert dataset.item_ids[dataset.target(user, "test")] == ids[-1]
        assert dataset.item_ids[dataset.target(user, "validation")] == ids[-2]
    assert (dataset.items.dtype, dataset.offsets.dtype, dataset.timestamps.dtype) == (np.int32, np.int64, np.int64)
    assert (dataset.valid_position.dtype, dataset.test_position.dtype) == (np.int32, np.int32)


def test_row_order_does_not_matter(tmp_path):
    catalogue, sequences = random_rows(5)
    first = save(tmp_path / "a", catalogue, sequences)
    second = save(tmp_path / "b", catalogue[::-1], sequences[::-1])
    assert first.hash == second.hash
    for name in (dataset_lib.ITEMS_FILE, dataset_lib.SEQUENCES_FILE, "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_content_changes_the_hash(tmp_path):
    catalogue, sequences = random_rows(6)
    first = save(tmp_path / "a", catalogue, sequences)
    catalogue[0]["title"] = "another title"
    assert save(tmp_path / "b", catalogue, sequences).hash != first.hash


def test_quarantine_travels_with_the_dataset(tmp_path):
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"line": 1}\n')
    save(tmp_path / "a", *random_rows(0), quarantine=lines)
    save(tmp_path / "b", *random_rows(0))
    assert (tmp_path / "a" / dataset_lib.QUARANTINE_FILE).read_text() == '{"line": 1}\n'
    assert (tmp_path / "b" / dataset_lib.QUARANTINE_FILE).read_text() == ""


def test_users_without_a_target(tmp_path):
    catalogue, sequences = random_rows(3)
    positions = [(2, 1, -1), (0, -1, 1), (3, -1, -1), (1, 1, 2)]  # train_end, validation, test of four users
    sequences = sorted(sequences, key=lambda row: row["user_id"])[:4]
    for row, (end, valid, test) in zip(sequences, positions, strict=True):
        end = valid if valid >= 0 else end
        row |= {"train_end": end, "valid_position": valid, "test_position": test}
    dataset = save(tmp_path / "d", catalogue, sequences)
    assert dataset.train_end.tolist() == [1, 0, 3, 1]
    assert dataset.users_with("validation").tolist() == [0, 3] and dataset.users_with("test").tolist() == [1, 3]
    assert dataset.users_with("train").tolist() == [2]
    lengths = np.diff(dataset.offsets)
    assert dataset.history_lengths("validation").tolist() == [1, 0, 3, 1]
    assert dataset.history_lengths("test").tolist() == [lengths[0], 1, lengths[2], 2]
    for split in ("validation", "test"):
        for user in range(4):
            assert len(dataset.history(user, split)) == dataset.history_lengths(split)[user]
    assert dataset.item_ids[dataset.target(3, "test")] == sequences[3]["item_ids"][2]
    assert len(dataset.train_items(2)) == 3
    with pytest.raises(CalrecError, match="user 'u0' of toy has no test target"):
        dataset.target(0, "test")


def test_unknown_split_is_an_error(tmp_path):
    dataset = save(tmp_path / "d", *random_rows(0))
    with pytest.raises(CalrecError, match="split='train'.*validation.*test"):
        dataset.history(0, "train")


def test_missing_folder_and_wrong_kind(tmp_path):
    with pytest.raises(CalrecError, match="nowhere.*does not exist"):
        Dataset.load(tmp_path / "nowhere")
    (tmp_path / "t").mkdir()
    artifacts.write_manifest(tmp_path / "t", kind="tokenizer", made_from={}, settings={})
    with pytest.raises(CalrecError, match="holds a tokenizer, and a dataset is wanted"):
        Dataset.load(tmp_path / "t")


def rewrite(folder, file, table):
    """Replaces a table and the manifest, as a faulty writer would."""
    manifest = artifacts.read_manifest(folder, kind="dataset")
    pq.write_table(table, folder / file)
    facts = {key: value for key, value in manifest.items() if key not in ("hash", "gin")}
    digest = ContentDigest(table.schema)
    digest.update(table)
    facts["content"][file] = digest.hexdigest()
    artifacts.write_manifest(folder, **facts)


def broken(message, file, change):
    return pytest.param(message, file, change, id=message[:30])


def with_column(name, values):
    def change(table):
        index = table.column_names.index(name)
        return table.set_column(index, name, pa.array(values(table[name].to_pylist()), table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    ("message", "file", "change"),
    [
        broken(r"items\.parquet lacks the columns \['text'\]", "items.parquet", lambda t: t.drop(["text"])),
        broken(r"sequences\.parquet lacks.*timestamps", "sequences.parquet", lambda t: t.drop(["timestamps"])),
        broken("names item 'zzz', which is not in", "sequences.parquet", with_column(
            "item_ids", lambda rows: [["zzz", *rows[0][1:]], *rows[1:]])),
        broken("of user 'u0' are not 0 <= train_end = valid < test < length", "sequences.parquet", with_column(
            "test_position", lambda rows: [99, *rows[1:]])),
        broken("are not 0 <= train_end", "sequences.parquet", with_column(
            "valid_position", lambda rows: [-2, *rows[1:]])),
        broken("are not 0 <= train_end = valid", "sequences.parquet", with_column(
            "train_end", lambda rows: [0, *rows[1:]])),
        broken("user_id must be ascending", "sequences.parquet", with_column("user_id", lambda rows: rows[::-1])),
        broken("differ in length", "sequences.parquet", with_column(
            "timestamps", lambda rows: [rows[0][:-1], *rows[1:]])),
        broken("column user_id has 1 nulls", "sequences.parquet", with_column("user_id", lambda r: [None, *r[1:]])),
        broken("a purchase without an item or a time", "sequences.parquet", with_column(
            "timestamps", lambda rows: [[None, *rows[0][1:]], *rows[1:]])),
        broken("item_id must be ascending", "items.parquet", with_column("item_id", lambda rows: rows[::-1])),
        broken("columns of other types", "sequences.parquet", lambda t: t.set_column(
            2, "timestamps", pa.array([["soon"]] * len(t)))),
    ],
)  # fmt: skip
def test_files_that_do_not_agree(tmp_path, message, file, change):
    folder = tmp_path / "d"
    save(folder, *random_rows(1))
    rewrite(folder, file, change(pq.read_table(folder / file)))
    with pytest.raises(CalrecError, match=message):
        Dataset.load(folder)


def test_changed_or_missing_file_is_noticed(tmp_path):
    folder = tmp_path / "d"
    save(folder, *random_rows(1))
    items = folder / dataset_lib.ITEMS_FILE
    whole = items.read_bytes()
    items.write_bytes(whole + b" ")
    with pytest.raises(CalrecError, match=r"items\.parquet cannot be read as Parquet"):
        Dataset.load(folder)
    pq.write_table(pq.read_table(io.BytesIO(whole)), items, compression="none", row_group_size=2)
    assert Dataset.load(folder).item_ids[0] == "i00"  # other bytes, the same values
    table = pq.read_table(items)
    pq.write_table(table.set_column(1, "title", pa.array(["x", *table["title"].to_pylist()[1:]])), items)
    with pytest.raises(CalrecError, match=r"items\.parquet does not hold what its manifest names"):
        Dataset.load(folder)
    items.unlink()
    with pytest.raises(CalrecError, match=r"items\.parquet is missing.*calrec prepare"):
        Dataset.load(folder)
