"""Every text a model is asked with, and every text composed for it. Each module carries a VERSION that enters the
fingerprints of what it produced: change a text, raise its version, and exactly those rows are made again."""
