// The player of a denoising that was saved as a page of its own (dgemma.studio.exports): `film.js` stands before it in
// the same script.

import { Board, Film, SPEEDS, kept, keep, pause } from "dgemma-studio/film.js";

const made = (name, options = {}, ...children) => {
  const { classes, ...properties } = options;
  const element = Object.assign(document.createElement(name), properties);
  if (classes) element.className = classes;
  element.append(...children);
  return element;
};

const { recording, stops } = JSON.parse(document.getElementById("film").textContent);
const film = Film.whole(recording), moments = film.moments();
const box = document.getElementById("player");
const body = made("div", { classes: "cv-body", tabIndex: 0, role: "group", ariaLabel: "Tokens: left and right are steps" });
const board = new Board(body, stops);
const button = (name, title, press) => made("button", { classes: "cv-button", type: "button", textContent: name, title, onclick: press });
const playing = button("Play", "Space", () => play());
const speed = made("select", { classes: "cv-button", ariaLabel: "Speed" },
  ...SPEEDS.map(([value, textContent]) => made("option", { value, textContent })));
speed.value = kept("speed", "1");
speed.onchange = () => keep("speed", speed.value);
const slider = made("input", { type: "range", min: 0, max: moments.length - 1, ariaLabel: "Step", oninput: () => go(slider.valueAsNumber) });
const where = made("span", { classes: "cv-where" });
const toggles = ["heat", "layout"].map((name) => button(name === "heat" ? "Heat" : "Grid", "", () => {
  board.turn(name);
  dress();
}));
const track = made("div", { classes: "cv-track" });
track.innerHTML = `<svg class="cv-spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true"><path></path></svg>`;
track.querySelector("path").setAttribute("d", film.hill(moments));
track.append(slider);
box.append(made("div", { classes: "cv-bar" }, where, made("span", { classes: "cv-space" }), ...toggles), body,
  made("div", { classes: "cv-scrub" }, playing, speed, track));

let at = 0, timer = null;

function dress() {
  box.classList.toggle("heat", board.heat);
  box.classList.toggle("grid", board.layout === "grid");
  box.classList.toggle("flow", board.layout !== "grid");
  toggles[0].ariaPressed = String(board.heat);
  toggles[1].ariaPressed = String(board.layout === "grid");
}

function show(moment) {
  at = Math.max(0, Math.min(moments.length - 1, moment));
  board.paint(film, ...moments[at]);
  slider.value = at;
  where.textContent = slider.ariaValueText = film.where(...moments[at]);
}

function stop() {
  clearTimeout(timer);
  timer = null;
  playing.textContent = "Play";
}

function go(moment) {
  stop();
  show(moment);
}

function play() {
  if (timer !== null) {
    stop();
    return;
  }
  show(at >= moments.length - 1 ? 0 : at);
  playing.textContent = "Pause";
  const next = () => {
    if (at >= moments.length - 1) {
      stop();
      return;
    }
    show(at + 1);
    timer = setTimeout(next, pause(film, moments, at, speed.value));
  };
  timer = setTimeout(next, pause(film, moments, at, speed.value));
}

document.addEventListener("keydown", (event) => {
  if (event.target.closest("button, select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), Home: () => go(0),
    End: () => go(moments.length - 1), " ": play }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

dress();
show(moments.length - 1);
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
