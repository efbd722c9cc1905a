"""Parts of pages: each is made where it is to be, and told what to show."""
