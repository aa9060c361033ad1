"""Which rows an export has, in which split, and in which object."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.errors import InputError
from gaudi_batch.export.plan import FOLDER_FILES, cut, in_order, parse_size, parts_of
from gaudi_batch.export.selection import Splits, select

ROWS = pa.table(
    {
        "id": ["a", "b", "c", "d"],
        "row": [0, 1, 2, 3],
        "image_index": pa.array([0, 0, 0, None], pa.int32()),
        "status": ["ok", "ok", "ok", "failed"],
        "nsfw": [True, False, None, None],
        "topic": ["x", "y", None, "x"],
        "width": pa.array([64, 128, 256, 64], pa.int32()),
        "label": ["a,b", 'say "a"', "a", "null"],
        "said": ['say "hi", x', "x", '"', "<b>"],
        "made": pa.array([0, 1_000_000_001, None, 2 * 10**18], pa.timestamp("ns")),
        "finished_at": pa.array([0, 3600 * 10**6, 86_400 * 10**6, None], pa.timestamp("us", "UTC")),
        "half": pa.array(np.array([0, 1, 2, 3], np.float16)),
        "hour": pa.array([0, 1, 2, 3], pa.time32("s")),
        "style": pa.array(["x", "y", None, "x"]).dictionary_encode(),
        "price": pa.array([Decimal("0.50"), Decimal("0.51"), None, Decimal("1.00")], pa.decimal128(10, 2)),
    }
)


def selected(*filters: str) -> str:
    return "".join(select(ROWS, filters)["id"].to_pylist())


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ([], "abc"),
        (["nsfw=false"], "b"),
        (["nsfw!=true"], "bc"),
        (["nsfw=null"], "c"),
        (["nsfw!=null"], "ab"),
        (["topic=x"], "a"),
        (["topic==x"], "a"),
        (["style=x,null"], "ac"),
        (["style<y"], "a"),
        (["topic == x,y"], "ab"),
        (["topic = x,y"], "ab"),
        (["topic!=x,null"], "b"),
        (["width>=128"], "bc"),
        (["width<256", "topic=y"], "b"),
        (["width<1.285e2"], "ab"),
        (["width=128.0, 256"], "bc"),
        (["width!=128.5"], "abc"),
        (["width<1e30", "width>=-1e30", "width>0x40"], "bc"),
        (["width=0x40,256.0"], "ac"),
        (["price=0.51"], "b"),
        (["price=0.505"], ""),
        (["price>0.505"], "b"),
        (["price<=0.505"], "a"),
        (["price!=0.505,0.500"], "bc"),
        (["price=0.500,null"], "ac"),
        (["status=failed"], "d"),
        (["status=ok,failed", "topic=x"], "ad"),
        (['label="a,b"'], "a"),
        (['label!="a,b"'], "bc"),
        (['label = "a,b" , a'], "ac"),
        (['label="say ""a"""'], "b"),
        (['label=say "a"'], "b"),
        (['label="null"', "status!=null"], "d"),
        (["label=null"], ""),
        (['said!="say ""hi"", x"'], "bc"),
        (['said="say ""hi"", x",x'], "ab"),
        (['said=say "hi", "x"'], "b"),
        (['said="<b>"', "status=failed"], "d"),
        (['label<"a,c"'], "ac"),
        (["made=1970-01-01T00:00:01.000000001"], "b"),
        (["made!=1970-01-01T00:00:01.000000001,null"], "a"),
        (["made>1970-01-01T00:00:01"], "b"),
        (["finished_at>1970-01-01"], "bc"),
        (["finished_at>=1970-01-01", "finished_at<1970-01-02"], "ab"),
        (["finished_at=1970-01-01T01:00"], "b"),
        (["finished_at=1970-01-01T01:00:00Z,1970-01-02T02:00+02:00"], "bc"),
    ],
)
def test_a_filter_takes_the_rows_that_it_says(filters: list[str], ids: str) -> None:
    assert selected(*filters) == ids


def test_who_compares_a_text_with_a_number_is_told_how_texts_compare(caplog: pytest.LogCaptureFixture) -> None:
    for filters in (["width<128.5"], ["label<b"], ["label=1"], ["said>2026-11-29"]):
        selected(*filters)
    assert not caplog.records
    selected("label<=10")
    assert "--filter 'label<=10' compares texts letter by letter: '10' comes before '9'" in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nsfw", "must be COLUMN=VALUE"),
        ("nsf=true", "the manifest has no column 'nsf'; did you mean 'nsfw'?"),
        ("width=wide", "'wide' is no value of a column of type int32"),
        ("width=1e2,wide", "'wide' is no value of a column of type int32"),
        ("width=1e2,nan", "'nan' is no value of a column of type int32"),
        ("width<1e99", "'1e99' is no value of a column of type int32"),
        ("width<1e-99999999", "'1e-99999999' is no value of a column of type int32"),
        ("price<1e-99999999", "'1e-99999999' is no value of a column of type decimal128(10, 2)"),
        ("price<1_0", "'1_0' is no value of a column of type decimal128(10, 2)"),
        ("width<1,2", "< takes one value; one with a comma in it stands in double quotes"),
        ("width<null", "< takes one value"),
        ('label="a,b', "a value that begins with a double quote must end with one"),
        ('label="a" b', "a value that begins with a double quote must end with one"),
        ("label!=a,b", "'a,b' is several values, and one value of the column"),
        ('said!=say "hi", x', 'one value of the column; as "say ""hi"", x" it is one'),
        ("label!=a,b", 'as "a,b" it is one, and with each of them in double quotes it is several'),
        ("topic!==x", "'!==' compares nothing; it must be =, ==, !=, <, <=, > or >="),
        ("topic<>x", "'<>' compares nothing; it must be =, ==, !=, <, <=, > or >="),
        ("width=>64", "'=>' compares nothing; it must be =, ==, !=, <, <=, > or >="),
        ("topic===x", "'===' compares nothing"),
        ("width!64", "'!' compares nothing"),
        ("said=<b>", "a value that begins with one of = ! < > stands in double quotes"),
        ("finished_at>noon", "timestamp[us, tz=UTC]; a time is as 2026-11-29 or 2026-11-29T14:30:00"),
        ("made>1970-01-01T00:00Z", "timestamp[ns]; a time is as 2026-11-29 or 2026-11-29T14:30:00"),
        ("half=1", "'half' is a column of type halffloat, which can't be compared"),
        ("hour=12:30", "'hour' is a column of type time32[s], which can't be compared"),
    ],
)
def test_a_filter_that_can_t_be_is_refused_by_name(text: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        selected(text)
    assert told in str(refused.value)


def test_shares_are_of_a_hash_of_the_id_and_stay_whatever_else_is_exported() -> None:
    ids = [f"id {number}" for number in range(4000)]
    table = pa.table({"id": ids * 2})
    splits = Splits("test=10%,validation=5%", table.column_names).of(table)
    assert splits[:4000] == splits[4000:], "images of one prompt are in one split"
    shares = {name: splits.count(name) / len(splits) for name in ("train", "test", "validation")}
    assert shares["test"] == pytest.approx(0.1, abs=0.02)
    assert shares["validation"] == pytest.approx(0.05, abs=0.02)
    assert sum(shares.values()) == pytest.approx(1)
    some = pa.table({"id": ids[::7]})
    assert Splits("test=10%,validation=5%", ["id"]).of(some) == splits[:4000:7]
    assert set(Splits("a=50%,b=50%", ["id"]).of(table)) == {"a", "b"}


def test_a_column_names_splits() -> None:
    assert Splits("topic", ROWS.column_names).of(ROWS) == ["x", "y", "train", "x"]
    assert Splits(None, ROWS.column_names).of(ROWS) == ["train"] * 4


@pytest.mark.parametrize(
    ("text", "values", "told"),
    [
        ("tpic", ["x"], "must be shares, as test=5%, or a column; did you mean 'topic'?"),
        ("test=5", ["x"], "'test=5' is no share"),
        ("test=0%", ["x"], "is no share"),
        ("a=60%,b=50%", ["x"], "the shares are 110 % together"),
        ("a=6%,a=5%", ["x"], "'a' is there twice"),
        ("../x=5%", ["x"], "is no share"),
        ("all=5%", ["x"], "can't be the name of a split"),
        ("é=5%", ["x"], "can't be the name of a split"),
        ("Test=5%,test=5%", ["x"], "'test' is there twice"),
        ("Train=5%", ["x"], "differs from 'train'"),
        ("lists", ["x"], "is a column of lists or structs"),
        ("topic", ["../x"], "can't be the name of a split"),
        ("topic", ["X", "x"], "differ in case alone"),
        ("topic", ["con", "x"], "'con' can't be the name of a split"),
        ("topic", ["Lpt1", "x"], "'Lpt1' can't be the name of a split"),
        ("aux=5%", ["x"], "'aux' can't be the name of a split"),
        ("made", ["x"], "can't be the name of a split"),
        ("topic", [str(number) for number in range(101)], "it has 101 values; at most 100"),
    ],
)
def test_splits_that_can_t_be_are_refused_by_name(text: str, values: list[str], told: str) -> None:
    table = pa.table({"id": values, "topic": values, "lists": [[value] for value in values]})
    table = table.append_column("made", pa.array([1_000_000_001] * len(values), pa.timestamp("ns")))
    with pytest.raises(InputError) as refused:
        Splits(text, table.column_names).of(table)
    assert told in str(refused.value)


def test_rows_are_in_order_of_split_and_row() -> None:
    rows, splits = in_order(ROWS, ["test", "train", "test", "a"])
    assert (rows["id"].to_pylist(), splits) == (["b", "d", "a", "c"], ["train", "a", "test", "test"])


@given(
    sizes=st.lists(st.tuples(st.sampled_from(["train", "test"]), st.integers(1, 10_000)), min_size=1),
    target=st.integers(1, 30_000),
)
def test_every_image_is_in_one_object_of_its_split_and_none_is_larger_than_it_must_be(
    sizes: list[tuple[str, int]], target: int
) -> None:
    sizes.sort()
    splits, numbers = [split for split, _ in sizes], [size for _, size in sizes]
    parts = parts_of(cut(splits, numbers, "parquet", target), "parquet")
    assert [(part.start, part.stop) for part in parts] == list(
        zip([0, *(part.stop for part in parts[:-1])], [part.stop for part in parts], strict=True)
    )
    assert parts[-1].stop == len(sizes)
    assert len({part.path for part in parts}) == len(parts)
    for part in parts:
        assert set(splits[part.start : part.stop]) == {part.split}
        assert part.stop - part.start == 1 or sum(numbers[part.start : part.stop]) <= target


def test_a_folder_has_as_many_files_as_the_hub_takes() -> None:
    parts = parts_of(cut(["train"] * 12_000, [10**9] * 12_000, "files", 1), "files")
    assert [part.stop - part.start for part in parts] == [FOLDER_FILES, FOLDER_FILES, 2000]
    assert [part.path for part in parts] == ["train/00000", "train/00001", "train/00002"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("20k", 20_000),
        ("1000", 1000),
        ("0", None),
        ("x", None),
        ("-1", None),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size: Any) -> None:
    if size is not None:
        assert parse_size(text) == size
        return
    with pytest.raises(InputError, match="must be a size such as 500MB"):
        parse_size(text)
