"""What a character wears, its face and its limbs: every value of the vocabulary as SVG elements.

Bodies are drawn in 128 x 128 pixels with y downwards; their anchors say where things go. A face is drawn about
(0, 0), between eyes and mouth, hats and hair about (0, 0) at the head's top, and each is then moved and scaled to its
anchor. Left and right are the subject's own, so its left eye and its left hand have the larger x.
"""
