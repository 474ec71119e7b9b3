"""What the suites of every world share: a generator and a judge enter; rates and a grid leave.

rates   Proportions with Wilson intervals
loop    Generate from a world's captions, batch by batch, and judge every image
grid    Samples as a labelled image grid
pairs   Two models on the same captions and noise
"""
