"""How uncertain a measured error is. Imports nothing, so that every command can import it at once."""


def wilson(error, count, z=1.96):
    """Wilson's score interval of an error measured on ``count`` images, errors in percent; z = 1.96 for 95 %."""
    share = error / 100
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
