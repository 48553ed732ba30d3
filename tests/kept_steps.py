"""What tests ask of the steps that keep what their weights' gradients are made of."""

from lstm_ext import step_gradients


def rows_kept(monkeypatch):
    """A list that gets an entry for each step that is kept from now on: its rows."""
    found = []

    def spy(self, products, step, rows, wanted, start=step_gradients.KeptSteps.__init__):
        found.append(rows)
        start(self, products, step, rows, wanted)

    monkeypatch.setattr(step_gradients.KeptSteps, "__init__", spy)
    return found
