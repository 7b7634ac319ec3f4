"""The parts of the HTML report; ``common.report`` puts them together."""
