// The live canvas: one answer's tokens, each in its place, while they are denoised, and again step by step after that.
//
// The server pushes openings and frames (dgemma.studio.recording says what is in them); when the answer is over, all of
// them are fetched from `src`. What a user asks of a canvas (edits, exports) is told to the server as events.

import { Board, Film, SPEEDS, keep, kept, nats, pause } from "dgemma-studio/film.js";
import CanvasEditor from "dgemma-studio/editor.js";

const PACE = 90; // milliseconds that a step is shown for, unless others wait
const MOST_WAITING = 12; // steps; older ones are left out

export default {
  components: { CanvasEditor },

  template: `
    <section class="cv" :class="[layout, { heat, live }]" v-show="live || available" @keydown="key" aria-label="Canvas">
      <div class="cv-bar">
        <button v-if="!live && src" class="cv-button cv-replay" type="button" @click="toggle" :aria-expanded="open">
          <i class="q-icon material-icons" aria-hidden="true">{{ open ? 'expand_less' : 'movie_filter' }}</i>
          {{ open ? 'Close' : 'Replay' }}</button>
        <span v-if="live" class="cv-pulse" aria-hidden="true"></span>
        <span class="cv-status" :role="live ? 'status' : null">{{ status }}</span>
        <span class="cv-space"></span>
        <template v-if="live || open">
          <button class="cv-button" type="button" @click="turn('heat')" :aria-pressed="heat"
                  title="Colour every token by its entropy">Heat</button>
          <button class="cv-button" type="button" @click="turn('layout')" :aria-pressed="layout === 'grid'"
                  title="Show tokens in cells of one size">Grid</button>
        </template>
      </div>
      <div v-show="(live || open) && !editing" class="cv-body" ref="body" @mouseover="hover" @click="choose"
           :tabindex="open && !live ? 0 : null" :role="open && !live ? 'group' : null"
           :aria-label="open && !live ? 'Tokens. Left and right: steps; up and down: one token\\'s life' : null"></div>
      <canvas-editor v-if="editing" ref="editor" :film="film" :number="moments[at][0]" :index="moments[at][1]"
                     :stops="stops" :grid="layout === 'grid'" @type="ask('type', $event)"
                     @denoise="ask('denoise', $event)" @close="edit"></canvas-editor>
      <div v-if="open && !live && count" class="cv-scrub">
        <button class="cv-button cv-round" type="button" @click="play" :aria-label="playing ? 'Pause' : 'Play'">
          <i class="q-icon material-icons" aria-hidden="true">{{ playing ? 'pause' : 'play_arrow' }}</i></button>
        <select class="cv-button cv-speed" v-model="speed" @change="keepSpeed" aria-label="Speed">
          <option v-for="[value, name] in speeds" :value="value">{{ name }}</option></select>
        <div class="cv-track">
          <svg class="cv-spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
            <path :d="area"></path></svg>
          <input type="range" min="0" :max="count - 1" v-model.number="at" @input="seek" aria-label="Step"
                 :aria-valuetext="where">
        </div>
        <span class="cv-where">{{ where }}</span>
      </div>
      <div v-if="life && open && !live && !editing" class="cv-life">
        <div class="cv-life-head"><b>Position {{ life.place + 1 }}</b>
          <span>{{ life.pinned ? 'pinned' : 'entropy by step, in nats' }}</span><span class="cv-space"></span>
          <button class="cv-button cv-round" type="button" @click="look(null)" aria-label="Close">
            <i class="q-icon material-icons" aria-hidden="true">close</i></button></div>
        <div class="cv-bars"><button v-for="bar in life.bars" type="button" class="cv-step"
             :class="{ now: bar.now, accepted: bar.accepted }" @click="go(bar.moment)" :aria-current="bar.now || null"
             :title="'step ' + bar.step + ': ' + bar.text + ' at ' + bar.entropy.toFixed(3) + ' nats'">
          <span class="cv-column"><span :style="{ height: bar.height + '%' }"></span></span>
          <span class="cv-token">{{ bar.text }}</span><span class="cv-nats">{{ bar.entropy.toFixed(2) }}</span></button>
        </div>
        <ol v-if="life.candidates" class="cv-candidates" aria-label="The likeliest tokens in this step">
          <li v-for="one in life.candidates"><span class="cv-token">{{ one.text }}</span>
            <span class="cv-share"><span :style="{ width: 100 * one.share + '%' }"></span></span>
            <span class="cv-nats">{{ (100 * one.share).toFixed(1) }} %</span></li></ol>
        <p v-else class="cv-hint">To see the likeliest tokens of every step, set Candidates in the settings and make the
          answer again.</p>
      </div>
      <div v-if="open && !live && count && !editing && (editable || exportable)" class="cv-more">
        <button v-if="editable" class="cv-button" type="button" @click="edit"
                title="Pin, clear or type over tokens, and denoise again from here">
          <i class="q-icon material-icons" aria-hidden="true">edit_note</i>Edit and denoise again</button>
        <span class="cv-space"></span>
        <template v-if="exportable"><span class="cv-hint" id="cv-save">Save</span>
          <button v-for="kind in ['SVG', 'GIF', 'HTML', 'Trace']" class="cv-button" type="button" :key="kind"
                  :disabled="saving" @click="save(kind)" :aria-label="'Save as ' + kind">{{ kind }}</button></template>
      </div>
    </section>`,

  props: { src: String, running: Boolean, summary: String, stops: Array, recorded: Boolean, editable: Boolean,
    exportable: Boolean },

  data() {
    return {
      live: this.running, available: this.recorded, open: false, status: this.running ? "reading the prompt …" : this.summary,
      heat: kept("heat", "no") === "yes", layout: kept("layout", "flow"), speed: kept("speed", "1"), speeds: SPEEDS,
      at: 0, count: 0, where: "", area: "", playing: false, life: null, editing: false, saving: false,
    };
  },

  created() {
    // Not reactive: thousands of numbers that only the board reads.
    this.film = new Film();
    this.moments = [];
    this.queue = [];
    this.board = null;
    this.timer = null;
  },

  mounted() {
    this.board = new Board(this.$refs.body, this.stops);
  },

  beforeUnmount() {
    clearTimeout(this.timer);
    this.timer = null;
    this.playing = false;
  },

  watch: {
    summary(text) { if (!this.live) this.status = text; },
  },

  methods: {
    // ---- from the server ----

    push(news) {
      this.film.learn(news);
      for (const opening of news.openings ?? []) {
        this.film.open(opening);
        this.queue.push([opening.canvas, -1]);
      }
      for (const [canvas, frame] of news.frames ?? []) {
        this.film.add(canvas, frame);
        this.queue.push([canvas, this.film.canvases[canvas].frames.length - 1]);
      }
      if (news.rate !== undefined) this.rate = news.rate;
      if (news.over) this.ending = news;
      if (this.timer === null) this.advance();
    },

    advance() {
      if (this.queue.length > MOST_WAITING) this.queue.splice(0, this.queue.length - MOST_WAITING);
      const next = this.queue.shift();
      if (next) {
        this.board.paint(this.film, ...next);
        this.tell(...next);
        this.timer = setTimeout(() => this.advance(), Math.max(16, PACE / Math.max(1, this.queue.length)));
        return;
      }
      this.timer = null;
      if (this.ending) this.timer = setTimeout(() => this.finish(), 350);
    },

    finish() {
      this.timer = null;
      this.live = false;
      this.available = this.ending.recorded;
      this.status = this.ending.summary;
      this.film = new Film(); // what was pushed may have left out steps
      this.ending = null;
    },

    tell(number, index) {
      const canvas = this.film.canvases[number], frame = canvas.frames[index];
      const parts = [`canvas ${canvas.index + 1}`];
      if (frame) parts.push(`step ${frame.step} of at most ${canvas.maxSteps}`, `mean entropy ${frame.mean.toFixed(3)}`);
      if (this.rate) parts.push(`${this.rate} tokens/s`);
      this.status = parts.join(" · ");
    },

    turn(name) {
      this.board.turn(name);
      this.heat = this.board.heat;
      this.layout = this.board.layout;
      if (this.life) this.board.mark(this.life.place);
    },

    // ---- again, step by step ----

    async toggle() {
      this.open = !this.open;
      this.playing = this.editing = false;
      if (!this.open) return;
      if (!this.film.canvases.length) {
        const response = await fetch(this.src);
        if (!response.ok) {
          this.status = await response.text();
          this.open = false;
          return;
        }
        this.load(await response.json());
      }
    },

    show(recording) {
      // A recording that comes from elsewhere than `src`.
      this.open = this.available = true;
      this.playing = this.editing = false;
      this.life = null;
      this.load(recording);
    },

    load(recording) {
      this.film = Film.whole(recording);
      this.moments = this.film.moments();
      this.count = this.moments.length;
      this.area = this.film.hill(this.moments);
      this.at = this.count - 1;
      if (this.count) this.seek();
      else this.status = "no step of this answer was recorded";
    },

    seek() {
      const [number, index] = this.moments[this.at];
      this.board.paint(this.film, number, index);
      this.where = this.film.where(number, index);
      if (this.life) this.look(this.life.place);
    },

    go(moment) {
      this.playing = false;
      this.at = Math.max(0, Math.min(this.count - 1, moment));
      this.seek();
    },

    play() {
      this.playing = !this.playing;
      if (!this.playing) return;
      if (this.at >= this.count - 1) this.at = 0;
      else this.at += 1;
      this.seek();
      const next = () => {
        if (!this.playing) return;
        if (this.at >= this.count - 1) {
          this.playing = false;
          return;
        }
        this.at += 1;
        this.seek();
        setTimeout(next, pause(this.film, this.moments, this.at, this.speed));
      };
      setTimeout(next, pause(this.film, this.moments, this.at, this.speed));
    },

    keepSpeed() {
      keep("speed", this.speed);
    },

    key(event) {
      if (!this.open || this.live || this.editing || !this.count || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target !== this.$refs.body) return; // buttons and the slider have keys of their own
      const [number] = this.moments[this.at], length = this.film.canvases[number].ids.length;
      const place = this.life?.place ?? -1;
      const act = {
        ArrowLeft: () => this.go(this.at - 1), ArrowRight: () => this.go(this.at + 1),
        Home: () => this.go(0), End: () => this.go(this.count - 1), " ": () => this.play(),
        ArrowUp: () => this.look(Math.max(0, place - 1)), ArrowDown: () => this.look(Math.min(length - 1, place + 1)),
        Escape: () => this.look(null),
      }[event.key];
      if (!act) return;
      event.preventDefault();
      event.stopPropagation();
      act();
    },

    // ---- together with other canvases (together.js) ----

    async unfold() {
      while (this.live) { // the last steps are still being shown, or on their way
        if (this.ending) {
          clearTimeout(this.timer);
          this.queue = [];
          this.finish();
        } else await new Promise((resolve) => setTimeout(resolve, 50));
      }
      if (!this.open) await this.toggle();
    },

    seconds() {
      return this.count ? this.frameOf(this.count - 1).seconds : 0;
    },

    walk(share, seconds) {
      // To this share of its steps; or, unless null, to what it showed so many seconds after the request began.
      if (!this.open || !this.count) return;
      let moment = Math.round(share * (this.count - 1));
      if (seconds !== null) {
        moment = 0;
        while (moment + 1 < this.count && this.frameOf(moment + 1).seconds <= seconds) moment += 1;
      }
      if (moment !== this.at) this.go(moment);
    },

    frameOf(moment) {
      const [canvas, index] = this.moments[moment];
      return this.film.canvases[canvas].frames[index];
    },

    placeOf(event) {
      const place = event.target.dataset?.place;
      return place === undefined ? null : Number(place);
    },

    hover(event) {
      const place = this.placeOf(event);
      if (place === null || !this.board.shown) return;
      const [film, number, index] = this.board.shown, canvas = film.canvases[number], frame = canvas?.frames[index];
      if (!frame) return;
      event.target.title = `${JSON.stringify(film.texts[frame.ids[place]])} · token ${frame.ids[place]} · ${nats(frame.e[place]).toFixed(3)} nats${canvas.pinned.has(place) ? " · pinned" : ""}`;
    },

    choose(event) {
      const place = this.placeOf(event);
      if (place === null || this.live) return;
      this.look(this.life?.place === place ? null : place);
    },

    look(place) {
      this.board.mark(place);
      if (place === null) {
        this.life = null;
        return;
      }
      const [film, number, shown] = this.board.shown, canvas = film.canvases[number];
      const first = this.moments.findIndex(([at]) => at === number);
      const bars = canvas.frames.map((frame, index) => ({
        step: frame.step, entropy: nats(frame.e[place]), text: film.told(frame.ids[place]),
        height: Math.max(3, 100 * frame.e[place] / 255), accepted: Boolean(frame.f[place] & 1),
        now: index === shown, moment: first + index }));
      this.life = { place, bars, pinned: canvas.pinned.has(place),
        candidates: film.candidates(canvas.frames[shown], place) };
    },

    // ---- what the server is asked to do ----

    edit() {
      this.playing = false;
      this.editing = !this.editing;
      if (this.editing) this.$nextTick(() => this.$refs.editor.focus());
    },

    ask(name, what) {
      this.$emit(name, what);
    },

    typed(answer) {
      this.film.learn(answer);
      this.$refs.editor?.typed(answer);
    },

    refused(why) {
      this.$refs.editor?.refused(why);
    },

    save(kind) {
      this.saving = true;
      this.$emit("save", kind.toLowerCase());
    },

    saved() {
      this.saving = false;
    },
  },
};
