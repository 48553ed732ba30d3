"""Speed of ``lstm_ext.LSTM`` beside ``torch.nn.LSTM``: ``python -m bench --help``.

Who knows what, each module only those above it:

* ``suites``   the problems, as data, and the arithmetic each one needs
* ``timing``   what a problem runs, and interleaved timing of the two modules
* ``report``   the machine, the table on the terminal, the JSON on disk
* ``__main__`` the command line

Nothing here checks that results are right: the tests do that, and they never time.
"""
