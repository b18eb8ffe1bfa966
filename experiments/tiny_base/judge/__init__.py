"""What a picture shows, read from its pixels: a judge of generated pictures that has learnt nothing.

It knows only how the renderer draws. The subject is cut out of the picture (cutout.py), brought into the pose in which
bodies are drawn (pose.py) and compared there with drawings of what it might show (drawings.py, colours.py); the nearest
is the reading (attributes.py, reading.py). Dots and stripes are looked for by their colour and not told apart. Of
subjects without a known shape (people, emoji, blobs) the background is all that is read.

python -m experiments.tiny_base.judge --calibrate 200

reads that many true drawings, sharp and blurred, and prints how often it is right: hold a model's scores against that.
"""

from experiments.tiny_base.judge.calibration import blurred
from experiments.tiny_base.judge.cutout import silhouette
from experiments.tiny_base.judge.drawings import overlap
from experiments.tiny_base.judge.reading import OWN, Reading, correct, kind_of, read

__all__ = ["OWN", "Reading", "blurred", "correct", "kind_of", "overlap", "read", "silhouette"]
