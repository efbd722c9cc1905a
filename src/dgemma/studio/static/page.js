// What every page needs of the browser: copying code, following an answer as it grows, shortcuts.

document.addEventListener("click", (event) => {
  const button = event.target.closest?.(".code-copy");
  if (!button) return;
  navigator.clipboard.writeText(button.closest(".code").querySelector("pre").textContent).then(() => {
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
});

// A list of messages stays at its end while it grows, unless its reader has scrolled away from there.
const followed = new WeakSet();
const follow = (box) => {
  followed.add(box);
  let atEnd = true, height = 0;
  box.addEventListener("scroll", () => {
    if (box.scrollHeight === height) atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  });
  const settle = () => {
    height = box.scrollHeight;
    if (atEnd) box.scrollTop = height;
  };
  new ResizeObserver(settle).observe(box.firstElementChild ?? box);
  new MutationObserver(settle).observe(box, { childList: true, subtree: true });
  box.addEventListener("to-end", () => {
    atEnd = true;
    settle();
  });
};
new MutationObserver(() => {
  for (const box of document.querySelectorAll(".follow")) if (!followed.has(box)) follow(box);
}).observe(document.documentElement, { childList: true, subtree: true });

const press = (name) => document.querySelector(`[data-key="${name}"]`);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") {
    const button = event.target.closest?.(".code-copy");
    if (button) {
      event.preventDefault();
      button.click();
    }
  }
  const command = event.ctrlKey || event.metaKey;
  const typing = event.target.closest?.("input, textarea, [contenteditable]");
  if (command && event.key.toLowerCase() === "k") {
    event.preventDefault();
    press("search")?.querySelector("input")?.focus();
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    press("new")?.click();
  } else if (event.key === "Escape" && !document.querySelector(".q-dialog, .q-menu")) {
    press("stop")?.click();
  } else if (event.key === "/" && !typing && !command) {
    event.preventDefault();
    press("compose")?.querySelector("textarea")?.focus();
  }
});

// Back and forward lead to addresses that this page has put there itself.
window.addEventListener("popstate", () => window.location.reload());
