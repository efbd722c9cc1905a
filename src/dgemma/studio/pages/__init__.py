"""The studio's pages: each module has a ``PAGE`` (`dgemma.studio.app.Page`), and is found by that."""
