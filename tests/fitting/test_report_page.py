"""The page of a fit: which mistakes it shows."""

import pandas as pd

from steadytune.fitting.report_page import mistakes


def test_mistakes_are_the_wrong_rows_the_surest_first():
    """Row 5 is right and surest of all; of the wrong ones 9 (0.9) comes before 7 (0.6)."""
    predictions = pd.DataFrame(
        {"set": "test", "row": [5, 7, 9], "label": ["a", "a", "b"], "prediction": ["a", "b", "a"],
         "probability_a": [0.99, 0.4, 0.9], "probability_b": [0.01, 0.6, 0.1]}
    )  # fmt: skip
    found = mistakes(predictions, {"test": pd.DataFrame({"text": ["one", "two", "three"]}, index=[5, 7, 9])})
    assert found[["row", "text", "size"]].to_numpy().tolist() == [[9, "three", 0.9], [7, "two", 0.6]]
