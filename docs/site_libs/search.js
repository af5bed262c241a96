// Search of the site: finds the words of a question wherever they stand, rare words first. The pages ask for a class
// `Fuse` with a method `search`; this one takes its place, because Fuse looks for the question as one string.
(() => {
  "use strict";
  const COMMON = new Set(("a about after all an and are as at be before by can do does for from has have how i if in into is it its many much my not of on " +
    "one or our so than that the then there they this to was we what when where which who why will with you your").split(" "));
  const FIELDS = [["title", 4], ["section", 6], ["text", 1]];
  const words = (text) => text.toLowerCase().match(/[a-z0-9]+/g) || [];
  const stem = (word) => word.length < 5 ? word : word.replace(/(?:ing|ied|ies|ed|es|s|e)$/, "");

  class Fuse {
    constructor(entries) {  // for each word, the entries that hold it, with a weight
      this.entries = entries;
      this.index = new Map();
      const lengths = entries.map((entry) => words(entry.text || "").length), mean = lengths.reduce((a, b) => a + b, 1) / (entries.length || 1);
      this.length = lengths.map((length) => 0.4 + 0.6 * length / mean);
      entries.forEach((entry, i) => FIELDS.forEach(([field, weight]) => words(entry[field] || "").forEach((word) => {
        const key = stem(word);
        if (!this.index.has(key)) this.index.set(key, new Map());
        const holders = this.index.get(key);
        holders.set(i, (holders.get(i) || 0) + weight);
      })));
    }

    matches(word) {  // entries with a word, or with one that begins so, and their weights
      const key = stem(word), found = new Map(this.index.get(key) || []);
      if (word.length > 2) this.index.forEach((holders, other) => {
        if (other !== key && (other.startsWith(key) || other.startsWith(word))) holders.forEach((weight, i) => found.set(i, (found.get(i) || 0) + weight / 2));
      });
      return found;
    }

    search(question, { limit = 20 } = {}) {
      const asked = [...new Set(words(question))], rare = asked.filter((word) => !COMMON.has(word));
      const query = rare.length ? rare : asked, scores = new Map(), held = new Map();
      query.forEach((word) => {
        const found = this.matches(word), rarity = Math.log(1 + this.entries.length / (1 + found.size));
        found.forEach((weight, i) => {
          scores.set(i, (scores.get(i) || 0) + rarity * weight / (weight + 2 * this.length[i]));
          held.set(i, (held.get(i) || 0) + 1);
        });
      });
      const whole = question.trim().toLowerCase();
      const score = (i) => scores.get(i) * (held.get(i) / query.length) + ((this.entries[i].section || this.entries[i].title).toLowerCase() === whole ? 100 : 0);
      const best = [...scores.keys()].map((i) => [score(i), i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, limit);
      return best.map(([, i]) => ({ item: { ...this.entries[i], text: this.excerpt(this.entries[i].text, query) } }));
    }

    excerpt(text, query) {  // the part of a text that holds most words of the query
      const places = query.flatMap((word) => [...text.toLowerCase().matchAll(new RegExp("\\b" + stem(word), "g"))].slice(0, 20).map((m) => [m.index, word]));
      const within = (start) => new Set(places.filter(([at]) => at >= start && at < start + 150).map(([, word]) => word)).size;
      const starts = places.map(([at]) => at).sort((a, b) => within(b) - within(a) || a - b);
      const start = starts.length ? Math.max(0, text.lastIndexOf(" ", Math.max(0, starts[0] - 20)) + 1) : 0;
      return (start ? "… " : "") + text.slice(start, start + 220);
    }
  }
  window.Fuse = Fuse;
})();
