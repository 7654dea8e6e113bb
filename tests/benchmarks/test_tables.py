"""Tables of the docs are those of the committed result files."""

from benchmarks.evidence import labelfree_tables


def test_the_tables_without_labels() -> None:
    document = labelfree_tables.DOCUMENT.read_text()
    rows = labelfree_tables.Rows.read()
    for name in labelfree_tables.TABLES:
        assert f"<!-- table: {name} -->" in document, name
    assert labelfree_tables.rewritten(document, rows) == document, (
        "run python -m benchmarks.evidence.labelfree_tables"
    )
