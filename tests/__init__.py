from beartype import BeartypeConf, beartype

# Checks shape annotations in tests; an int may stand where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
