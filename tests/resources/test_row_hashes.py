"""Equal columns have equal hashes however Arrow lays them out, and other columns have others."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalselect_assets.resources.row_hashes import ChangedRowsError, check_columns, with_column_hashes

texts = st.lists(st.none() | st.text(max_size=5), max_size=6)
lists = st.lists(st.none() | st.lists(st.none() | st.text(max_size=3), max_size=3), max_size=6)
numbers = st.lists(st.none() | st.integers(-(2**31), 2**31 - 1), max_size=6)
KINDS = [(texts, pa.string()), (lists, pa.list_(pa.string())), (numbers, pa.int32())]


def table(values: list[Any], kind: pa.DataType) -> pa.Table:
    return pa.table({"row": pa.array(range(len(values)), pa.int64()), "x": pa.array(values, kind)})


@pytest.mark.parametrize(("values", "kind"), KINDS)
@given(st.data())
def test_only_equal_columns_pass(values: st.SearchStrategy[list[Any]], kind: Any, data: Any) -> None:
    one, other = data.draw(values), data.draw(values)
    metadata = with_column_hashes(table(one, kind))
    check_columns(table(one, kind), metadata)
    if one != other:
        with pytest.raises(ChangedRowsError):
            check_columns(table(other, kind), metadata)


@pytest.mark.parametrize(("values", "kind"), KINDS)
@given(st.data())
def test_chunks_and_slices_do_not_matter(values: st.SearchStrategy[list[Any]], kind: Any, data: Any) -> None:
    drawn = data.draw(values)
    whole = table(drawn, kind)
    cut = data.draw(st.integers(0, len(drawn)))
    padded = pa.concat_tables([whole.slice(0, 0), whole.slice(0, cut), whole.slice(cut)])
    check_columns(padded, with_column_hashes(whole))
    if kind == pa.string():
        large = padded.set_column(1, "x", padded["x"].cast(pa.large_string()))
        check_columns(large, with_column_hashes(whole))
